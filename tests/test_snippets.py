"""The Python of README and docs, run page by page as it stands, where the runs and files that it names are there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import convert, finetune, pretrain
from sparse_fcmae.demo import draw_images

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]
QUICKER = {  # what is written otherwise to take seconds
    'out="runs/first", model="atto"': 'out="runs/other", max_steps=1, batch_size=2, model="atto"',
    "fullgraph=True)": 'fullgraph=True, backend="eager")',
    'create_fcmae("tiny")': 'create_fcmae("atto")',
    'create_classifier("tiny"': 'create_classifier("atto"',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages name: images, a pretraining run, a classifier, a segmentation model, and converted weights."""
    folder = tmp_path_factory.mktemp("pages")
    draw_images(folder / "LABELLED", 20, seed=0)
    for name in ("IMAGES", "PAIRS/images", "PAIRS/masks"):
        (folder / name).mkdir(parents=True)
    for number, path in enumerate(sorted((folder / "LABELLED").rglob("*.png"))):
        image = Image.open(path).resize((256, 256))
        image.save(folder / "IMAGES" / f"{number}.png")
        image.save(folder / ("photo.jpg" if number else "another.jpg"))
        if number < 6:
            image.save(folder / "PAIRS" / "images" / f"{number}.png")
            bright = np.asarray(image.convert("L")) > 128
            Image.fromarray(bright.astype(np.uint8)).save(folder / "PAIRS" / "masks" / f"{number}.png")
    runs, few = folder / "runs", {"max_steps": 1, "num_workers": 0, "dtype": "fp32"}
    pretrain(data=folder / "IMAGES", out=runs / "first", batch_size=4, **few)
    labelled = {"data": folder / "LABELLED", "val_split": 0.5, "batch_size": 4}
    finetune(**labelled, init=runs / "first", out=runs / "tuned", **few)
    pairs = {"data": folder / "PAIRS", "task": "segmentation", "val_split": 0.5, "batch_size": 2, "image_size": 64}
    finetune(**pairs, init=runs / "first", out=runs / "masks", **few)
    for name, to in (("first-timm", "timm"), ("first-hf", "huggingface"), ("first-onnx", "onnx")):
        convert(runs / "first", folder / name, to=to)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for code in BLOCK.findall(page.read_text()):
        for whole, quick in QUICKER.items():
            code = code.replace(whole, quick)
        exec(compile(code, str(page), "exec"), names)


def test_what_is_written_otherwise_is_still_there():
    text = "".join(page.read_text() for page in PAGES)
    assert all(whole in text for whole in QUICKER)
