"""The files in examples/, run on small data."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tifffile
import torch
from nbclient import NotebookClient
from PIL import Image
from transformers import ConvNextV2Backbone, RTDetrForObjectDetection

from sparse_fcmae import convert, create_encoder, create_fcmae, load_encoder, load_fcmae
from sparse_fcmae.weights.convert import export_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_detection(tmp_path):
    rng, images, annotations = np.random.default_rng(0), [], []
    (tmp_path / "photos").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 60, (80, 96, 3), np.uint8)
        left, top, side = (int(rng.integers(low, high)) for low, high in ((0, 60), (0, 50), (16, 30)))
        pixels[top : top + side, left : left + side, number % 2] = 250
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        annotations.append({"image_id": number, "category_id": 5 + number % 2, "bbox": [left, top, side, side]})
    categories = [{"id": 5, "name": "red"}, {"id": 6, "name": "green"}]
    (tmp_path / "photos.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    export_model(create_encoder("atto"), tmp_path / "encoder")
    convert(tmp_path / "encoder", tmp_path / "backbone", to="huggingface")
    detection = load("detection")
    names = {5: "red", 6: "green"}
    begun = detection.detector(str(tmp_path / "backbone"), names, 32, 20).model.backbone.model.state_dict()
    converted = ConvNextV2Backbone.from_pretrained(tmp_path / "backbone", out_features=detection.STAGES)
    assert all(torch.equal(value, begun[name]) for name, value in converted.state_dict().items())
    options = {"encoder": "encoder", "backbone": "backbone", "images": "photos", "annotations": "photos.json"}
    given = [part for name, value in options.items() for part in (f"--{name}", str(tmp_path / value))]
    small = ["--size", "96", "--epochs", "5", "--batch-size", "4", "--width", "32", "--queries", "20", "--lr", "1e-3"]
    losses = detection.main([*given, "--out", str(tmp_path / "detector"), *small])
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    again = RTDetrForObjectDetection.from_pretrained(tmp_path / "detector")
    assert again.config.id2label == {0: "red", 1: "green"}
    assert Image.open(tmp_path / "detector" / "first.png").size == (96, 80)


def test_satellite(tmp_path, capsys):
    rng, x = np.random.default_rng(0), np.linspace(0, 1, 70)
    for number in range(3):  # planes, which interpolation fills in and a mean does not
        slopes = rng.uniform(0.1, 0.3, (2, 5))
        scene = slopes[0] * x[:, None, None] + slopes[1] * x[:66, None] + rng.normal(0, 1e-3, (70, 66, 5))
        np.save(tmp_path / f"{number}.npy", scene.astype(np.float32))
    satellite = load("satellite")
    words = f"--scenes {tmp_path} --held-out ./2.npy --out {tmp_path / 'run'} --epochs 4 --batch-size 4 --masks 2"
    errors = satellite.main([*words.split(), "--bands", "5,3,1"])
    assert (errors["interpolation"] < 0.5 * errors["mean"]).all()
    assert {name: len(of_band) for name, of_band in errors.items()} == {"mean": 5, "interpolation": 5, "model": 5}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["in_chans"] == 5
    assert [Path(path).name for path in config["data"]] == ["0.npy", "1.npy"]
    assert Image.open(tmp_path / "run" / "filled-in.png").width > 300
    assert "interpolation" in capsys.readouterr().out
    tiles = satellite.windows(np.load(tmp_path / "2.npy"))
    assert np.array_equal(tiles[3], np.load(tmp_path / "2.npy")[32:64, 32:64])
    model = load_fcmae(tmp_path / "run")
    torch.nn.init.zeros_(model.pred.weight)
    for pixel in range(8 * 8):  # each patch is predicted as the numbers of its pixels, in its channel 1
        model.pred.bias.data.view(8 * 8, 5)[pixel] = torch.tensor([0.0, pixel, 0, 0, 0])
    found = satellite.by_model(model, tiles, model.draw_mask(len(tiles), (32, 32)))
    form = model.encoder.transform.form
    assert found[0, 9, 10, 1] == pytest.approx(form.mean[1] + form.std[1] * (8 * 1 + 2), rel=1e-5)


def test_microscopy(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "fields").mkdir()
    for number in range(6):
        field = rng.normal(30, 2, (140, 150))
        for _ in range(8):
            top, left = rng.integers(10, 110), rng.integers(10, 110)
            field[top : top + 24, left : left + 24] += 60
            field[top + 8 : top + 14, left + 8 : left + 14] += 90
        tifffile.imwrite(tmp_path / "fields" / f"{number}.tif", field.clip(0, 255).astype(np.uint8))
    microscopy = load("microscopy")
    mask = microscopy.mask_by_thresholds(tifffile.imread(tmp_path / "fields" / "0.tif"))
    assert set(np.unique(mask)) == {0, 1, 2}
    monkeypatch.setattr(microscopy, "STEPS", 2)
    monkeypatch.setattr(microscopy, "BATCH", 2)
    words = f"--images {tmp_path / 'fields'} --out {tmp_path / 'out'} --epochs 1 --batch-size 4 --masks 2 --seeds 3"
    with pytest.raises(SystemExit):
        microscopy.main([*words.split(), "--masks", "9"])
    assert "6 fields, 4 with spots to train on: too few for --masks 9" in capsys.readouterr().err
    rows = microscopy.main(words.split())
    assert [(row["masks"], row["start"], row["seed"]) for row in rows] == [(2, "pretrained", 3), (2, "random", 3)]
    assert all(0 <= row["miou"] <= 1 for row in rows)
    assert sorted(path.name for path in (tmp_path / "out" / "pairs" / "val" / "images").iterdir()) == ["2.tif", "5.tif"]
    assert "untrained: the nearest window is of the same field in " in capsys.readouterr().out
    features = {"features": np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), "files": np.array(["a", "b", "a", "b"])}
    apart = np.array([[0, 0, 8, 8], [0, 0, 8, 8], [8, 0, 16, 8], [4, 0, 12, 8]])
    np.savez(tmp_path / "four.npz", **features, boxes=apart)
    own, chance = microscopy.own_neighbours(tmp_path / "four.npz")
    assert own == 0  # windows that look alike are of the other file
    assert chance == pytest.approx(2 / 10)  # those of b overlap


SMALL = ["--size", "32", "--stem-stride", "1", "--batch-size", "8", "--epochs", "4", "--lr", "2e-3"]


def test_a_training_loop_of_ones_own(pictures, tmp_path):
    losses = load("training_loop").main(["--images", str(pictures), "--out", str(tmp_path / "encoder.pt"), *SMALL])
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.02
    state = torch.load(tmp_path / "encoder.pt", weights_only=True)["model"]
    encoder = load_encoder(tmp_path / "encoder.pt")
    assert torch.equal(encoder.state_dict()["stages.0.0.pwconv1.weight"], state["encoder.stages.0.0.pwconv1.weight"])


@pytest.mark.slow
def test_two_processes_in_a_training_loop_of_ones_own(pictures, tmp_path):
    program = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
    ]
    given = ["--images", str(pictures), "--out", str(tmp_path / "encoder.pt"), *SMALL]
    subprocess.run([*program, str(EXAMPLES / "training_loop.py"), *given], check=True, capture_output=True)
    assert load_encoder(tmp_path / "encoder.pt").name == "atto"


def test_lightning(pictures, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    trainer = load("with_lightning").main(["--images", str(pictures), "--out", str(tmp_path / "encoder.pt"), *SMALL])
    assert trainer.global_step == 20
    assert trainer.callback_metrics["loss"] < 0.99
    assert load_encoder(tmp_path / "encoder.pt").name == "atto"


@pytest.mark.parametrize("whose", ["official", "timm", "huggingface"])
def test_continued_pretraining(pictures, tmp_path, whose):
    encoder = create_encoder("atto")
    if whose == "official":  # as the authors name it, and wrap it
        given = tmp_path / "convnextv2_atto_1k_224_fcmae.pt"
        model = create_fcmae("atto")
        torch.save({"model": model.state_dict()}, given)
    else:
        export_model(encoder, tmp_path / "encoder")
        given = tmp_path / whose
        convert(tmp_path / "encoder", given, to=whose)
    out = str(tmp_path / "run")
    few = ["--epochs", "1", "--batch-size", "20", "--lr", "1e-9"]
    load("continued_pretraining").main(["--images", str(pictures), "--init", str(given), "--out", out, *few])
    before = model.encoder if whose == "official" else encoder
    after = load_encoder(out).state_dict()
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.state_dict().items())


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", 4)
    for cell in notebook.cells:  # as it stands, but for fewer images
        for whole, few in (("draw_images(images, 1000,", "draw_images(images, 100,"), ("epochs=12", "epochs=2")):
            cell.source = cell.source.replace(whole, few)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 4
    assert outputs[-1]["data"]["text/plain"] == "torch.Size([4, 320, 4, 4])"
