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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_fcmae.backends import choose_dtype
from sparse_fcmae.benchmarks.config import AblationsConfig
from sparse_fcmae.benchmarks.engine import benchmark
from sparse_fcmae.benchmarks.plots import draw_ablations, require_matplotlib, save_png
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.data.sources.class_folder import open_train_and_held_out
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.evaluation.evaluate import evaluate
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json, write_json, writing
from sparse_fcmae.runtime.options import check_given, image_size_of, listed
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
    "random": {"max_steps": 1, "lr": 1e-12},  # which moves no weight by more than some 1e-12
}
EVALUATIONS = 4  # by nearest neighbours, evenly over a run
BATCH, STEPS = 50, 400  # of fine-tuning
TUNING = {"lr": 1e-3, "min_crop": 0.3, "ema_decay": 0.0}
SETTINGS = "ablations.json"  # of the folder with all runs
FREE = {"data", "out", "variants", "seeds", "labels", "json", "csv", "png"}  # options that may differ from call to call
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
    train, held_out = opened(config)
    check_feasible(config, train, variants, seeds, labels)
    settle(config, device, train, held_out)
    rows = []
    for seed in seeds:
        for name in variants:
            with redirect_stdout(sys.stderr):  # the runs' logs, which are not a benchmark's output
                found = Trial(config, device, train, name, seed).rows(labels)
            rows += found
            yield found
    yield means(rows)
    if config.png and (figure := draw_ablations(rows)):
        save_png(figure, Path(config.png))


def opened(config: AblationsConfig) -> tuple[Labelled, Labelled]:
    """The images to train on and those that are held out. Raises UserError where `data` is no folder with both."""
    check_given(asdict(config), {"data": "a folder with train, and val or test, of class folders"})
    if not (Path(config.data) / "train").is_dir():
        raise UserError(f"`data` {config.data} has no folder train: name one with train, and val or test")
    return open_train_and_held_out(config.data)


def check_feasible(
    config: AblationsConfig, train: Labelled, variants: list[str], seeds: list[int], labels: list[int]
) -> None:
    """Raises UserError for what could not be trained, before hours are spent on what can."""
    if config.png:
        require_matplotlib()
    if min(seeds) < 0:
        raise UserError(f"`seeds` {config.seeds}: give numbers from 0 on")
    fewest = int(train.labels.bincount(minlength=len(train.classes)).min())
    if labels and not 1 <= min(labels) <= max(labels) <= fewest:
        raise UserError(f"`labels` {config.labels}: give numbers from 1 to {fewest}, which the smallest class has")
    if config.batch_size > len(train):
        raise UserError(f"`batch_size` {config.batch_size} is more than the {len(train)} images to train on")
    shape = {"image_size": image_size_of(config.image_size), "stem_stride": config.stem_stride}
    for name in variants:
        with torch.device("meta"):
            FCMAE(config.model, **shape, mask_ratio=VARIANTS[name].get("mask_ratio", 0.6))


def settle(config: AblationsConfig, device: torch.device, train: Labelled, held_out: Labelled) -> None:
    """Writes down what all runs of a folder have in common. Raises UserError where earlier ones had something else."""
    out = Path(config.out)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings |= {
        "device": device.type,
        "dtype": str(choose_dtype(config.dtype, device, "auto")),
        "tuning": [BATCH, STEPS, TUNING],
        "data": [train.fingerprint, held_out.fingerprint],
    }
    if (out / SETTINGS).exists() and "tuning" not in read_json(out / SETTINGS):
        raise UserError(f"`out` {out} holds another {SETTINGS}: choose another folder")
    if (out / SETTINGS).exists() and any(out.glob("*-seed*")):
        before = read_json(out / SETTINGS)
        if differing := [name for name, value in settings.items() if before.get(name) != value]:
            raise UserError(f"`out` {out} holds runs with another `{differing[0]}`: choose another folder")
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / SETTINGS, settings)


@dataclass(frozen=True)
class Trial:
    """A variant from a seed, on the device of the benchmark. train: the images that it is trained on."""

    config: AblationsConfig
    device: torch.device
    train: Labelled
    variant: str
    seed: int

    def rows(self, labels: list[int]) -> list[Row]:
        """Trains it, or goes on with that, and measures it: a row, or one for each number of labels."""
        row = {"variant": self.variant, "seed": self.seed, "epochs": self.config.epochs}
        row |= self.pretrained() | {"linear": self.linear()}
        return [row | {"labels": count, "tuned": self.tuned(count)} for count in labels] or [row]

    @property
    def run(self) -> Path:
        """The folder of its pretraining."""
        return Path(self.config.out) / f"{self.variant}-seed{self.seed}"

    @property
    def computing(self) -> dict[str, Any]:
        """The options of every command that say what it is computed by."""
        return {"device": str(self.device), "dtype": self.config.dtype}

    def pretrained(self) -> Row:
        """The loss over the last epoch, and the nearest neighbours' accuracies over the epochs."""
        config = self.config
        options = {
            "data": str(Path(config.data) / "train"),
            "knn": config.data,
            "model": config.model,
            "image_size": config.image_size,
            "stem_stride": config.stem_stride,
            "batch_size": config.batch_size,
            "epochs": config.epochs,
            "lr": config.lr,
            "eval_every": -(-config.epochs // EVALUATIONS),
        }
        variant = options | VARIANTS[self.variant]
        pretrain(**variant, **self.computing, seed=self.seed, out=str(self.run), resume="auto")
        losses = [line["loss"] for line in lines_of(self.run / "metrics.jsonl") if line["loss"] is not None]
        curve = [[line["epoch"], line["knn_top1"]] for line in lines_of(self.run / "evaluations.jsonl")]
        epoch = losses[-(len(self.train) // config.batch_size) :]
        return {"loss": statistics.mean(epoch), "knn": curve[-1][1], "curve": curve}

    def linear(self) -> float:
        """The linear probe's accuracy on what was exported, kept in a file beside that."""
        path = self.run / "linear.json"
        if not path.exists():
            init = str(self.run / "exported")
            found = evaluate(data=self.config.data, init=init, linear_probe=True, **self.computing)
            write_json(path, {"linear_probe_top1": found["linear_probe_top1"]})
        return read_json(path)["linear_probe_top1"]

    def tuned(self, labels: int) -> float:
        """The accuracy after fine-tuning on so many labels of each class, drawn by the seed."""
        out = self.run.with_name(f"{self.run.name}-labels{labels}")
        finetune(
            data=self.config.data,
            init=str(self.run / "exported"),
            labels_per_class=labels,
            batch_size=min(BATCH, labels * len(self.train.classes)),
            max_steps=STEPS,
            eval_every=STEPS,  # epochs, which are never more than steps: in the end alone
            seed=self.seed,
            out=str(out),
            resume="auto",
            **TUNING,
            **({"layer_decay": 1.0} if self.variant == "random" else {}),
            **self.computing,
        )
        return lines_of(out / "evaluations.jsonl")[-1]["top1"]


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
