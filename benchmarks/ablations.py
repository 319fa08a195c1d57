"""What pretraining is worth as one thing about it varies: ablations of the paper in small, on any labelled images.

Each variant is pretrained without labels, from several seeds. Its frozen features are judged by nearest neighbours,
while it trains too, and by a linear probe. Then it is fine-tuned on a few labels of each class. Every run has a folder
of its own, so that what was done before is not done again.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparse_fcmae.benchmarks.config import AblationsConfig
from sparse_fcmae.benchmarks.engine import benchmark
from sparse_fcmae.benchmarks.plots import draw_ablations, require_matplotlib, save_png
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.data.sources.class_folder import open_train_and_held_out
from sparse_fcmae.evaluation.evaluate import evaluate
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json, write_json, writing
from sparse_fcmae.runtime.options import listed
from sparse_fcmae.tasks.finetuning import finetune
from sparse_fcmae.tasks.pretraining import pretrain

VARIANTS: dict[str, dict[str, Any]] = {  # what differs in the options of `pretrain`
    "base": {},
    "no-grn": {"grn": False},
    "v1-block": {"grn": False, "layer_scale": True},
    "dense": {"sparse": False},
    "mask-0.3": {"mask_ratio": 0.3},
    "mask-0.75": {"mask_ratio": 0.75},
    "mask-0.9": {"mask_ratio": 0.9},
    "decoder-3": {"decoder_depth": 3},
    "random": {"max_steps": 1, "lr": 1e-12},  # which leaves the weights as they were drawn
}
EVALUATIONS = 4  # by nearest neighbours, evenly over a run
TUNING = {"lr": 1e-3, "min_crop": 0.3, "ema_decay": 0.0}
BATCH, STEPS = 50, 400  # of fine-tuning
SETTINGS = "settings.json"  # of the folder with all runs
FREE = {"out", "variants", "seeds", "labels", "json", "csv", "png"}  # options that may differ from call to call
COLUMNS: Columns = {
    "variant": ("variant", ""),
    "seed": ("seed", "d"),
    "seeds": ("seeds", "d"),
    "loss": ("loss", ".3f"),
    "knn": ("k-NN", ".3f"),
    "knn_sd": ("sd", ".3f"),
    "linear": ("linear", ".3f"),
    "linear_sd": ("sd", ".3f"),
    "labels": ("labels a class", "d"),
    "tuned": ("fine-tuned", ".3f"),
    "tuned_sd": ("sd", ".3f"),
}


@benchmark("ablations", AblationsConfig, COLUMNS)
def ablations(config: AblationsConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns rows for each variant and seed, then the means and standard deviations over the seeds.

    loss: mean over the last epoch, which variants of other targets can't be compared by. curve: epochs and top-1
    accuracies of nearest neighbours. Accuracies are fractions of the held-out images. Of several numbers of labels,
    each has a row. Raises UserError for wrong options and data, and Interrupted when told to stop.
    """
    variants = listed("variants", config.variants, str, VARIANTS)
    seeds = listed("seeds", config.seeds, int)
    labels = listed("labels", config.labels, int) if config.labels else []
    if min(labels, default=1) < 1:
        raise UserError(f"`labels` {config.labels}: give numbers from 1 on, or none")
    if not (Path(config.data) / "train").is_dir():
        raise UserError(
            f"`data` {config.data} holds no train: name a folder with train, and val or test, of class folders"
        )
    if config.png:
        require_matplotlib()
    settle(config, device)
    rows = []
    for seed in seeds:
        for name in variants:
            with redirect_stdout(sys.stderr):  # the runs' logs, which are not a benchmark's output
                found = judged(config, device, name, seed, labels)
            rows += found
            yield found
    yield means(rows)
    if config.png and (figure := draw_ablations(rows)):
        save_png(figure, Path(config.png))


def settle(config: AblationsConfig, device: torch.device) -> None:
    """Writes down what all runs of a folder have in common. Raises UserError where earlier ones had something else."""
    path = Path(config.out) / SETTINGS
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings |= {"data": str(Path(config.data).resolve()), "device": device.type}
    if path.exists():
        before = read_json(path)
        if differing := [name for name, value in settings.items() if before.get(name) != value]:
            raise UserError(f"`out` {config.out} holds runs with another `{differing[0]}`: choose another folder")
        return
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def judged(config: AblationsConfig, device: torch.device, name: str, seed: int, labels: list[int]) -> list[Row]:
    """Pretrains a variant, or goes on with it, and measures it: a row, or one for each number of labels."""
    run = Path(config.out) / f"{name}-seed{seed}"
    row = {"variant": name, "seed": seed, "epochs": config.epochs} | pretrained(config, device, name, seed, run)
    row["linear"] = linear_of(config, run)
    return [row | tuned(config, name, seed, run, count) for count in labels] or [row]


def pretrained(config: AblationsConfig, device: torch.device, name: str, seed: int, run: Path) -> Row:
    """The loss and the nearest neighbours' accuracies of a variant's run."""
    train, _ = open_train_and_held_out(config.data)
    options = {
        "data": str(Path(config.data) / "train"),
        "knn": config.data,
        "model": config.model,
        "image_size": config.image_size,
        "stem_stride": config.stem_stride,
        "batch_size": config.batch_size,
        "epochs": config.epochs,
        "lr": config.lr,
        "eval_every": max(1, config.epochs // EVALUATIONS),
        "device": str(device),
        "dtype": config.dtype,
    }
    pretrain(**options | VARIANTS[name], seed=seed, out=str(run), resume="auto")
    losses = [line["loss"] for line in lines_of(run / "metrics.jsonl") if line["loss"] is not None]
    curve = [[line["epoch"], line["knn_top1"]] for line in lines_of(run / "evaluations.jsonl")]
    last = losses[-(len(train) // config.batch_size) :]
    return {"loss": statistics.mean(last), "knn": curve[-1][1], "curve": curve}


def linear_of(config: AblationsConfig, run: Path) -> float:
    """The linear probe's accuracy on what a run has exported, kept in a file beside it."""
    path = run / "linear.json"
    if not path.exists():
        found = evaluate(data=config.data, init=str(run), linear_probe=True, dtype=config.dtype)
        write_json(path, {"linear_probe_top1": found["linear_probe_top1"]})
    return read_json(path)["linear_probe_top1"]


def tuned(config: AblationsConfig, name: str, seed: int, run: Path, labels: int) -> Row:
    """Accuracy after fine-tuning on so many labels of each class, drawn by the seed."""
    train, _ = open_train_and_held_out(config.data)
    images = labels * len(train.classes)
    batch = min(BATCH, images)
    out = run.with_name(f"{run.name}-labels{labels}")
    options: dict[str, Any] = {"layer_decay": 1.0} if name == "random" else {}
    epochs = -(-STEPS // (images // batch))
    finetune(
        data=config.data,
        init=str(run / "exported"),
        labels_per_class=labels,
        batch_size=batch,
        epochs=epochs,
        eval_every=epochs,
        dtype=config.dtype,
        seed=seed,
        out=str(out),
        resume="auto",
        **TUNING,
        **options,
    )
    return {"labels": labels, "tuned": lines_of(out / "evaluations.jsonl")[-1]["top1"]}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of a JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def means(rows: list[Row]) -> list[Row]:
    """A row for each variant and number of labels: means over the seeds, and standard deviations of these."""
    found = []
    for key in dict.fromkeys((row["variant"], row.get("labels")) for row in rows):
        own = [row for row in rows if (row["variant"], row.get("labels")) == key]
        mean: Row = {"variant": key[0], "seeds": len(own)} | ({"labels": key[1]} if key[1] else {})
        for measure in ("loss", "knn", "linear", "tuned"):
            if values := [row[measure] for row in own if measure in row]:
                mean[measure] = statistics.mean(values)
                if len(values) > 1 and measure != "loss":
                    mean[f"{measure}_sd"] = statistics.stdev(values)
        found.append(mean)
    return found
