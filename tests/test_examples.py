"""The files in examples/, run on small data."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ConvNextV2Backbone, RTDetrForObjectDetection

from sparse_fcmae import convert, create_encoder
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
