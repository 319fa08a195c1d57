"""Fine-tuning on several labels an image and on numbers, as its user runs it."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import fails
from PIL import Image
from safetensors.torch import load_file

from sparse_fcmae import UserError, convert, evaluate, finetune, load_classifier, predict
from sparse_fcmae.weights.read import read_weights

SMALL = {"from_scratch": True, "image_size": 32, "stem_stride": 1, "batch_size": 8, "lr": 2e-3, "num_workers": 0}
SMALL |= {
    "depths": "1,1,1,1",
    "dims": "16,32,64,128",
    "ema_decay": 0,
    "rand_augment": 0,
    "random_erasing": 0,
    "min_crop": 0.8,
    "drop_path": 0,
    "dtype": "fp32",
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Images with colours, and a green stripe: tables of which colours are in each, and of how wide the stripe is."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    several, numbers = [("path", "label", "split")], [("path", "label", "split")]
    for number in range(40):
        red, blue, wide = rng.random() < 0.5, rng.random() < 0.5, int(rng.integers(0, 32))
        pixels = rng.integers(0, 60, (32, 32, 3), np.uint8)
        pixels[:, :wide, 1] = 250
        pixels[..., 0] += 130 * np.uint8(red)
        pixels[..., 2] += 130 * np.uint8(blue)
        Image.fromarray(pixels).save(root / f"{number}.png")
        split = "val" if number % 5 == 0 else "train"
        several.append((f"{number}.png", ";".join(["red"] * red + ["blue"] * blue), split))
        numbers.append((f"{number}.png", f"{wide / 2 + 100:.1f}", split))
    for name, rows in (("several", several), ("numbers", numbers)):
        with (root / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return root


def rows(run):
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_several_labels(tables, tmp_path, capsys):
    data, run = tables / "several.csv", tmp_path / "run"
    finetune(task="multilabel", data=data, out=run, epochs=15, eval_every=15, **SMALL)
    found = rows(run)[-1]
    assert found["mean_average_precision"] > 0.9
    assert read_weights(run).task == "multilabel"
    assert load_classifier(run).classes == ("blue", "red")
    again = evaluate(data=str(data), init=str(run), num_workers=0, dtype="fp32")
    assert again["f1"] == pytest.approx(found["f1"])
    assert again["mean_average_precision"] == pytest.approx(found["mean_average_precision"])
    assert "average precision by label, the worst first: " in capsys.readouterr().out
    assert sum(again["average_precision_by_label"].values()) == pytest.approx(2 * found["mean_average_precision"])
    table = predict(data=data, init=run, out=tmp_path / "t.jsonl", num_workers=0, dtype="fp32")
    answers = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(answers) == 40
    with data.open() as file:
        truth = {row["path"]: set(filter(None, row["label"].split(";"))) for row in csv.DictReader(file)}
    right = [{name for name in ("red", "blue") if a[f"p_{name}"] > 0.5} == truth[a["file"]] for a in answers]
    assert np.mean(right) > 0.8
    convert(run, tmp_path / "hf", to="huggingface")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert read_weights(tmp_path / "hf").task == "multilabel"
    assert "several labels" in convert(run, tmp_path / "timm", to="timm")
    # a head for the same labels is kept where the task is the same
    finetune(task="multilabel", data=data, out=tmp_path / "b", init=run, max_steps=1, batch_size=8, **usual())
    assert "starting from the encoder and head" in (tmp_path / "b" / "train.log").read_text()


def usual():
    kept = ("lr", "num_workers", "ema_decay", "rand_augment", "random_erasing")
    return {name: SMALL[name] for name in kept}


def test_numbers_come_in_their_own_units(tables, tmp_path):
    data, run = tables / "numbers.csv", tmp_path / "run"
    finetune(task="regression", data=data, out=run, epochs=20, eval_every=5, monitor="mae", **SMALL)
    best = min(rows(run), key=lambda row: row["mae"])
    assert best["r2"] > 0.5
    again = evaluate(data=str(data), init=str(run), num_workers=0)  # in float32, whatever the machine computes in
    assert again["mae"] == pytest.approx(best["mae"], rel=1e-4)
    with pytest.raises(UserError, match="`dtype=bf16` would round the numbers"):
        evaluate(data=str(data), init=str(run), num_workers=0, dtype="bf16")
    table = predict(data=data, init=run, out=tmp_path / "t.csv", num_workers=0)
    with table.open() as file:
        answers = list(csv.DictReader(file))
    errors = [abs(float(a["value"]) - float(a["label"])) for a in answers]
    assert np.mean(errors) < 3  # of values from 100 to 116
    resumed = load_file(run / "exported" / "model.safetensors")
    finetune(out=run, resume=True)
    after = load_file(run / "exported" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in resumed.items())


def test_a_random_part_is_held_out_whatever_the_labels(tables, tmp_path):
    lines = [line.rsplit(",", 1)[0] for line in (tables / "numbers.csv").read_text().splitlines()]
    (tables / "unsplit.csv").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    finetune(task="regression", data=tables / "unsplit.csv", out=run, val_split=0.25, max_steps=1, **SMALL)
    assert "a number each, 10 images held out; 30 samples" in (run / "train.log").read_text()
    again = evaluate(data=str(tables / "unsplit.csv"), init=str(run), val_split=0.25, num_workers=0, dtype="fp32")
    assert again["images"] == 10
    assert again["mae"] == pytest.approx(rows(run)[-1]["mae"], rel=1e-4)


def test_mistakes_are_one_line(tables, tmp_path, capsys):
    begun = ["finetune", "--from-scratch", "--out", tmp_path / "run", "--num-workers", 0, "--data"]
    several, numbers = tables / "several.csv", tables / "numbers.csv"
    assert "is no number" in fails(capsys, *begun, several, "--task", "regression", "--batch-size", 8)
    assert "--mixup does not go with --task regression" in fails(
        capsys, *begun, numbers, "--task", "regression", "--mixup", 0.5
    )
    assert "--class-weights does not go with --task multilabel" in fails(
        capsys, *begun, several, "--task", "multilabel", "--class-weights", "balanced"
    )
    assert "has no label" in fails(capsys, *begun, several)
    assert not (tmp_path / "run").exists()
