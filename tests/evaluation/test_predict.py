"""Tables of what a classifier says of each image: values, windows, flips, and how a killed call goes on."""

import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
import tifffile
import torch
from helpers import fails, randomise
from PIL import Image

from sparse_fcmae import UserError, create_classifier, create_encoder, evaluate, load_classifier, predict
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.evaluation import chunks
from sparse_fcmae.evaluation.plots import class_overlay
from sparse_fcmae.weights.convert import export_model

CLASSES = ("red", "blue", "green", "none")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "exported"
    model = randomise(create_classifier("atto", num_classes=4, image_size=32, stem_stride=1)).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    export_model(model, folder, CLASSES)
    return folder


def read(path):
    """The rows of a table, with numbers as such."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) if k.startswith("probability") else v for k, v in row.items()} for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_classes_and_probabilities_of_each_image(colours, classifier, tmp_path, suffix):
    out = predict(data=colours, init=classifier, out=tmp_path / f"x{suffix}", top_k=2, dtype="fp32", num_workers=0)
    found, model = read(out), load_classifier(classifier)
    assert list(found[0]) == ["file", "label", "class", "probability", "class2", "probability2"]
    assert len(found) == 36
    with torch.no_grad():
        expected = model(model.preprocess([str(colours / row["file"]) for row in found])).softmax(1)
    for row, probabilities in zip(found, expected, strict=True):
        assert row["label"] == row["file"].split("/")[1]
        p, order = probabilities.topk(2)
        assert [row["class"], row["class2"]] == [CLASSES[label] for label in order]
        assert [row["probability"], row["probability2"]] == pytest.approx(p.tolist(), rel=1e-4)


@pytest.mark.parametrize("flips", ["horizontal", "both"])
def test_flips(classifier, tmp_path, flips):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{number}.png")
    options = {"data": tmp_path / "data", "init": classifier, "dtype": "fp32", "num_workers": 0, "top_k": 9}
    found = read(predict(out=tmp_path / "x.jsonl", flips=flips, **options))
    assert "label" not in found[0]
    model = load_classifier(classifier)
    images = model.preprocess([str(tmp_path / "data" / row["file"]) for row in found])
    axes = [[], [3]] if flips == "horizontal" else [[], [3], [2], [2, 3]]
    with torch.no_grad():
        expected = torch.stack([model(images.flip(along)) for along in axes]).mean(0).softmax(1)
    for row, probabilities in zip(found, expected, strict=True):
        values = {row["class"]: row["probability"]} | {row[f"class{i}"]: row[f"probability{i}"] for i in (2, 3, 4)}
        assert [values[name] for name in CLASSES] == pytest.approx(probabilities.tolist(), rel=1e-4)


@pytest.fixture
def large(tmp_path):
    """Two images of 16 bits, larger than a window, one of a window's size and one that is damaged; the classifier."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    values = {"a": (40, 60), "b": (64, 96), "c": (32, 32)}
    values = {name: rng.integers(0, 4096, size).astype(np.uint16) for name, size in values.items()}
    for name, array in values.items():
        tifffile.imwrite(tmp_path / "data" / f"{name}.tif", array)
    (tmp_path / "data" / "bad.tif").write_bytes(b"II*\0 no image")
    form = ImageFormat("uint16", (2000.0,), (1200.0,), native=True)
    model = randomise(create_classifier("atto", num_classes=4, image_size=32, stem_stride=1, in_chans=1)).eval()
    with torch.no_grad():
        model.head.weight.mul_(50)
    export_model(model, tmp_path / "ours", CLASSES, form)
    return values, model


def logits_of(model, window):
    with torch.no_grad():
        return model(torch.from_numpy((window.astype(np.float32) - 2000) / 1200)[None, None])[0]


def test_an_image_is_the_mean_of_its_windows(tmp_path, large, capsys, monkeypatch):
    monkeypatch.setattr(chunks, "SAMPLES", 3)  # so that the windows of an image are in several chunks
    values, model = large
    options = {"data": tmp_path / "data", "init": tmp_path / "ours", "dtype": "fp32", "num_workers": 0, "batch_size": 3}
    by_window = read(predict(out=tmp_path / "w.jsonl", windows=True, top_k=4, **options))
    assert [row["file"] for row in by_window] == ["a.tif"] * 4 + ["b.tif"] * 6 + ["c.tif"]
    logits = {}
    for row in by_window:
        window = values[row["file"][0]][row["top"] : row["bottom"], row["left"] : row["right"]]
        logits.setdefault(row["file"], []).append(logits_of(model, window))
        expected = logits[row["file"]][-1].softmax(0)
        assert row["class"] == CLASSES[expected.argmax()]
        assert row["probability"] == pytest.approx(expected.max().item(), rel=1e-4)
    whole = read(predict(out=tmp_path / "i.jsonl", maps=tmp_path / "maps", top_k=4, **options))
    assert [row["file"] for row in whole] == ["a.tif", "b.tif", "c.tif"]
    for row in whole:
        expected = torch.stack(logits[row["file"]]).mean(0).softmax(0)
        assert row["class"] == CLASSES[expected.argmax()]
        assert row["probability"] == pytest.approx(expected.max().item(), rel=1e-4)
    assert "left out 1 that can't be read" in capsys.readouterr().out
    maps = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert maps == ["000000-a.tif.png", "000001-b.tif.png", "000002-c.tif.png"]
    with Image.open(tmp_path / "maps" / maps[1]) as picture:
        assert picture.size[0] == 1400


def test_a_pixel_of_a_map_has_the_colour_of_the_nearest_window():
    picture = np.full((20, 30, 3), 51, np.uint8)
    boxes = np.array([[0, 0, 16, 16], [14, 0, 30, 16], [0, 4, 16, 20], [14, 4, 30, 20]])[[2, 0, 3, 1]]
    probabilities = np.array([[0.25, 0.75], [1, 0], [0.5, 0.5], [0, 1]])
    colours = np.array([[1, 0, 0], [0, 0, 1]])
    found = class_overlay(picture, boxes, probabilities, colours)
    for (row, column), window, label in (
        ((0, 0), 1, 0),
        ((9, 14), 1, 0),
        ((10, 14), 0, 1),
        ((9, 15), 3, 1),
        ((19, 29), 2, 0),
    ):
        share = 0.65 * probabilities[window, label]
        assert found[row, column] == pytest.approx((1 - share) * 0.2 + share * colours[label])


def test_a_call_that_was_killed_goes_on_to_the_same_table(colours, classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SAMPLES", 8)
    options = {"data": colours, "init": classifier, "batch_size": 4, "num_workers": 0}
    whole = predict(out=tmp_path / "whole.csv", **options)
    monkeypatch.setattr(chunks.Chunks, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(out=tmp_path / "cut.csv", **options)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "SAMPLES", 8)
    assert predict(out=tmp_path / "cut.csv", **options).read_bytes() == whole.read_bytes()


def test_evaluate_writes_each_image(colours, classifier, tmp_path):
    found = evaluate(data=colours, init=classifier, per_image=tmp_path / "x.csv", dtype="fp32", num_workers=0)
    rows = read(tmp_path / "x.csv")
    assert list(rows[0])[:5] == ["file", "label", "correct", "class", "probability"]
    assert len(rows) == found["images"] == 12
    assert sum(row["correct"] == "True" for row in rows) / 12 == pytest.approx(found["top1"])
    predict(data=colours / "val", init=classifier, out=tmp_path / "y.csv", top_k=5, dtype="fp32", num_workers=0)
    for row, other in zip(rows, read(tmp_path / "y.csv"), strict=True):
        assert (row["file"], row["class"]) == (other["file"], other["class"])
        assert row["probability"] == pytest.approx(other["probability"], rel=1e-4)


def test_mistakes_in_one_line(colours, classifier, tmp_path, capsys):
    export_model(create_encoder("atto", image_size=32, stem_stride=1), tmp_path / "encoder")
    options = ["predict", "--data", colours, "--num-workers", 0, "--init"]
    for out in ("x.csv", "masks"):  # whatever it is that was expected
        assert "has no classification head: fine-tune it first" in fails(
            capsys, *options, tmp_path / "encoder", "--out", tmp_path / out
        )
    assert "--out" in fails(capsys, *options, classifier, "--out", tmp_path / "x.txt")
    for option in (["--windows"], ["--maps", tmp_path / "maps"]):
        line = fails(capsys, *options, classifier, "--out", tmp_path / "x.csv", *option)
        assert "--windows and --maps are of native windows: give --crop native" in line
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.png").write_text("mine")
    assert "is not empty: choose another or give --overwrite" in fails(
        capsys, *options, classifier, "--out", tmp_path / "x.csv", "--maps", tmp_path / "there"
    )
    (tmp_path / "there.csv").write_text("mine")
    assert "exists: choose another or give --overwrite" in fails(
        capsys, *options, classifier, "--out", tmp_path / "there.csv"
    )
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert not (tmp_path / "x.csv").exists()
    with pytest.raises(UserError, match="`per_image` is of a classifier"):
        evaluate(data=colours, init=classifier, per_image=tmp_path / "x.csv", knn=True)
    with pytest.raises(UserError, match=r"must end in .csv, .jsonl or .parquet"):
        evaluate(data=colours, init=classifier, per_image=tmp_path / "x.txt")
