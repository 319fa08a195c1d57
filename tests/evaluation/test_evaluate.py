import json
import sys

import pytest
import torch
from helpers import randomise
from PIL import Image

from sparse_fcmae import UserError, convert, create_classifier, create_encoder, evaluate
from sparse_fcmae.cli import main
from sparse_fcmae.data.decoders.image import PHOTOGRAPHS
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.class_folder import class_folder, open_splits
from sparse_fcmae.evaluation.imagenet import ALEXNET, wordnet_ids
from sparse_fcmae.evaluation.run import EvaluationSet, EvaluationView, run_model
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.weights.convert import export_model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "exported"
    export_model(randomise(create_encoder("atto", image_size=32, stem_stride=1)), folder)
    return folder


def trained(colours, folder, outputs=("blue", "green", "red"), classes=None):
    """Exports a classifier whose head is fitted to the colours; outputs: the colour that each output stands for,
    None for no colour."""
    model = randomise(create_classifier("atto", num_classes=len(outputs), image_size=32, stem_stride=1)).eval()
    data = class_folder(colours / "train")
    view = EvaluationView((32, 32), ImageFormat.imagenet(), PHOTOGRAPHS, 1.0, torch.device("cpu"))
    x, index, _ = run_model(EvaluationSet(data, view), lambda images: model.norm(create_features(model, images)))
    centre = x.mean(0)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-1e6)
        for place, colour in enumerate(outputs):
            if colour:
                away = x[data.labels[index] == data.classes.index(colour)].mean(0) - centre
                model.head.weight[place] = 100 * away / away.norm()
                model.head.bias[place] = -model.head.weight[place] @ centre
    export_model(model, folder, classes)


def create_features(model, images):
    return SparseEncoder.forward(model, images).mean((2, 3))


def test_encoder_without_head_by_both_probes(colours, encoder, tmp_path, capsys):
    found = evaluate(data=colours, init=encoder, knn=True, linear_probe=True, out=tmp_path / "out", neighbours=5)
    assert (found["knn_top1"], found["linear_probe_top1"], found["images"]) == (1, 1, 12)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    assert "knn top-1 100.00 %" in capsys.readouterr().out
    few = evaluate(data=colours, init=encoder, knn=True, labels_per_class=2)
    assert few["train_images"] == 6


def test_classifier_in_every_layout(colours, tmp_path, capsys):
    trained(colours, tmp_path / "ours", ("red", "blue", "green"), ("red", "blue", "green"))
    for to in ("timm", "huggingface"):
        convert(tmp_path / "ours", tmp_path / to, to=to)
    for name in ("ours", "timm", "huggingface"):
        arguments = ["--data", str(colours), "--init", str(tmp_path / name), "--out", str(tmp_path / "out")]
        arguments += ["--overwrite"]
        main(["evaluate", *arguments])
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert (found["top1"], found["images"]) == (1, 12)
        assert "top5" not in found  # of three classes
        assert found["by_class"] == {"blue": 1, "green": 1, "red": 1}
    confusion = json.loads((tmp_path / "out" / "confusion.json").read_text())
    assert confusion == {"classes": ["red", "blue", "green"], "counts": [[4, 0, 0], [0, 4, 0], [0, 0, 4]]}
    assert Image.open(tmp_path / "out" / "confusion.png").size[0] > 300
    assert "top-1 100.00 %" in capsys.readouterr().out


def test_imagenet_subsets_and_corruptions(colours, tmp_path):
    """A head of 1000 outputs, evaluated on folders of some WordNet ids, of numbers, and of ImageNet-C's layout."""
    places = {3: "blue", 500: "green", 999: "red"}
    trained(colours, tmp_path / "ours", [places.get(i) for i in range(1000)])
    ids = wordnet_ids()
    for folder, names in (("a", [ids[p] for p in places]), ("v2", [str(p) for p in places])):
        for name, colour in zip(names, ("blue", "green", "red"), strict=True):
            target = tmp_path / folder / name
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(colours / "val" / colour)
        found = evaluate(data=tmp_path / folder, init=tmp_path / "ours", device="cpu")
        assert (found["top1"], found["images"], found["outputs"]) == (1, 12, 1000)
        assert found["among"] == (3 if folder == "a" else 1000)
    for corruption in list(ALEXNET):
        for severity in "12345":
            target = tmp_path / "c" / "group" / corruption / severity
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(tmp_path / "a")
    wrong = tmp_path / "c" / "group" / "snow" / "5"
    wrong.unlink()
    for name, colour in zip([ids[p] for p in places], ("green", "red", "blue"), strict=True):
        wrong.mkdir(exist_ok=True)
        (wrong / name).symlink_to(colours / "val" / colour)
    found = evaluate(data=tmp_path / "c", init=tmp_path / "ours", num_workers=0)
    assert found["errors"]["snow"] == {"1": 0, "2": 0, "3": 0, "4": 0, "5": 1}
    assert found["mean_error"] == pytest.approx(0.2 / 15)
    assert found["mCE"] == pytest.approx(0.2 / ALEXNET["snow"] / 15)
    assert found["images"] == 12 * 75


def test_fewer_folders_than_classes_are_still_judged_among_all(colours, tmp_path):
    trained(colours, tmp_path / "ours", classes=("blue", "green", "red"))
    for name, colour in (("red", "blue"), ("green", "green")):  # what lies in red is blue
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / "some" / name).symlink_to(colours / "val" / colour)
    found = evaluate(data=tmp_path / "some", init=tmp_path / "ours", out=tmp_path / "out")
    assert (found["top1"], found["by_class"], found["among"]) == (0.5, {"green": 1, "red": 0}, 3)
    assert found["confusion"]["counts"] == [[0, 0, 0], [0, 4, 0], [4, 0, 0]]
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="holds an evaluation: choose another or give `overwrite=True`"):
        evaluate(data=tmp_path / "some", init=tmp_path / "ours", out=tmp_path / "out")
    with pytest.raises(UserError, match="no such file or folder"):
        evaluate(data=tmp_path / "some", init=tmp_path / "none", out=tmp_path / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    with pytest.raises(UserError, match="no such file or folder"):
        evaluate(data=tmp_path / "some", init=tmp_path / "none", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_unreadable_images_are_left_out_and_named(colours, tmp_path, capsys):
    trained(colours, tmp_path / "ours", classes=("blue", "green", "red"))
    data = tmp_path / "data"
    for name in ("blue", "green", "red"):
        (data / name).mkdir(parents=True)
        (data / name / "0.png").symlink_to(colours / "val" / name / "0.png")
    (data / "red" / "broken.png").write_text("no picture")
    found = evaluate(data=data, init=tmp_path / "ours")
    assert (found["images"], found["top1"], found["unreadable"]) == (3, 1, ["red/broken.png"])
    assert "1 more are unreadable, such as red/broken.png" in capsys.readouterr().out


def test_a_classifier_is_measured_on_what_was_split_off(colours, tmp_path):
    trained(colours, tmp_path / "ours", classes=("blue", "green", "red"))
    _, held_out = open_splits(colours / "train", 0.25, seed=3)
    for name in (held_out.name(i) for i in range(len(held_out))):
        assert (colours / "train" / name).is_file()
    found = evaluate(data=colours / "train", init=tmp_path / "ours", val_split=0.25, seed=3)
    assert (found["images"], len(held_out)) == (6, 6)
    assert (found["val_split"], found["seed"]) == (0.25, 3)
    assert found["top1"] > 0.9


@pytest.mark.parametrize("part", ["", "exported"])
def test_another_split_than_the_runs_is_said(colours, tmp_path, capsys, part):
    run = tmp_path / "run"
    trained(colours, run / "exported", classes=("blue", "green", "red"))
    (run / "config.json").write_text('{"format": "sparse-fcmae fine-tuning run", "val_split": 0.25, "seed": 3}')
    for options, said in (({"val_split": 0.25, "seed": 3}, False), ({"val_split": 0.25}, True)):
        evaluate(data=colours / "train", init=run / part, **options)
        assert ("was trained with --val-split 0.25 --seed 3" in capsys.readouterr().out) is said
    (tmp_path / "config.json").write_text("no JSON")  # somebody else's
    evaluate(data=colours / "train", init=run, val_split=0.25, seed=3)


def test_mistakes_are_one_line(colours, encoder, tmp_path, capsys, monkeypatch):
    data = colours
    trained(colours, tmp_path / "ours", classes=("blue", "green", "red"))
    (tmp_path / "other" / "cyan").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "cyan" / "x.png")
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ({"init": encoder}, "--data is missing"),
        ({"data": data}, "--init is missing"),
        ({"data": data, "init": encoder}, "has no classification head: give --knn or --linear-probe"),
        ({"data": tmp_path / "none", "init": tmp_path / "ours"}, "no such folder"),
        (
            {"data": tmp_path / "other", "init": tmp_path / "ours"},
            "class cyan is none of the head's 3 classes: blue, green, red",
        ),
        ({"data": data, "init": tmp_path / "ours", "labels-per-class": 3}, "goes with --knn or --linear-probe alone"),
        ({"data": data, "init": tmp_path / "ours", "crop-fraction": 0}, "--crop-fraction must be greater than 0"),
        ({"data": data, "init": tmp_path / "ours", "crop-fraction": 2}, "--crop-fraction must be at most 1, not 2.0"),
        ({"data": data, "init": tmp_path / "ours", "seed": -1}, "--seed must be at least 0, not -1"),
        ({"data": data, "init": tmp_path / "ours", "out": "/proc/none"}, "can't write /proc/none"),
        ({"data": data, "init": tmp_path / "ours", "out": tmp_path / "file"}, "is a file"),
        ({"data": data, "init": tmp_path / "ours", "image-size": "33"}, "not a multiple"),
        ({"data": data / "val", "init": encoder, "knn": ""}, "has no folder train"),
    ):
        flags = [part for k, v in arguments.items() for part in (f"--{k}", str(v)) if part]
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *flags])
        error = capsys.readouterr().err.strip()
        assert (stop.value.code, len(error.splitlines())) == (2, 1)
        assert message in error
    with pytest.raises(TypeError, match="unexpected keyword"):
        evaluate(dat=data)
    with pytest.raises(UserError, match="`init` is missing"):
        evaluate(data=data)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate(data=data, init=tmp_path / "ours", out=tmp_path / "out")
    assert "confusion.png is not drawn" in capsys.readouterr().out
    (tmp_path / "bad" / "red").mkdir(parents=True)
    (tmp_path / "bad" / "red" / "x.png").write_text("x")
    with pytest.raises(UserError, match=r"no image of .*bad is readable"):
        evaluate(data=tmp_path / "bad", init=tmp_path / "ours")
