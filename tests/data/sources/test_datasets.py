"""The layouts of data sets that docs/datasets.md names, and the commands there that make tables of their lists."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparse_fcmae.data.config import MaskConfig
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.class_folder import open_held_out, open_splits
from sparse_fcmae.data.sources.masked import open_masked_splits, survey_masks
from sparse_fcmae.data.sources.opening import open_images

PAGE = Path(__file__).parents[3] / "docs" / "datasets.md"
needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="the commands are for a shell")


def image(path, value=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 6), (value,) * 3 if mode == "RGB" else value).save(path)


def commands(word):
    """The block of the page that has this word."""
    return next(block for block in re.findall(r"```\n(.*?)```", PAGE.read_text(), re.DOTALL) if word in block)


def run(tmp_path, word):
    subprocess.run(["bash", "-e", "-c", commands(word)], cwd=tmp_path, check=True)


@needs_bash
def test_food_101(tmp_path):
    lists = {"train": ["apple_pie/1", "apple_pie/2", "waffles/3"], "test": ["apple_pie/4", "waffles/5"]}
    for split, names in lists.items():
        (tmp_path / "food-101" / "meta").mkdir(parents=True, exist_ok=True)
        (tmp_path / "food-101" / "meta" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            image(tmp_path / "food-101" / "images" / f"{name}.jpg")
    run(tmp_path, "food-101.csv")
    train, test = open_splits(tmp_path / "food-101" / "food-101.csv", None, 0)
    assert train.classes == test.classes == ("apple_pie", "waffles")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1], [0, 1])
    assert test.name(1) == "images/waffles/5.jpg"
    with test.open(1) as file:
        assert open_image(file, Reading()).size == (8, 6)
    assert len(open_images(tmp_path / "food-101" / "images")) == 5


@needs_bash
def test_pascal_voc(tmp_path):
    for split, names in (("train", ["2007_000032", "2007_000039"]), ("val", ["2007_000033"])):
        (tmp_path / "VOC2012" / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        file = tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / f"{split}.txt"
        file.write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            image(tmp_path / "VOC2012" / "JPEGImages" / f"{name}.jpg")
            image(tmp_path / "VOC2012" / "SegmentationClass" / f"{name}.png", number, "P")
    image(tmp_path / "VOC2012" / "JPEGImages" / "without_a_mask.jpg")
    run(tmp_path, "voc.csv")
    train, val = open_masked_splits(str(tmp_path / "VOC2012" / "voc.csv"), MaskConfig(), None, 0)
    assert (len(train), len(val)) == (2, 1)
    assert set(survey_masks(train, Reading())) == {0, 1}


def test_class_folders(tmp_path):
    for split in ("train", "val"):
        for name in ("00000_Animalia_Annelida", "00001_Animalia_Arthropoda"):
            image(tmp_path / "inat2021" / split / name / "a.jpg")
    train, val = open_splits(tmp_path / "inat2021", None, 0)
    assert len(train) == len(val) == 2
    for wordnet in ("n01498041", "n01531178"):
        image(tmp_path / "imagenet-a" / wordnet / "0.jpg")
    assert open_held_out(tmp_path / "imagenet-a").classes == ("n01498041", "n01531178")


def test_eurosat(tmp_path):
    for name in ("AnnualCrop", "River"):
        for number in range(5):
            file = tmp_path / "EuroSAT_MS" / name / f"{name}_{number}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(file, np.zeros((64, 64, 13), np.uint16), planarconfig="contig", photometric="minisblack")
    train, held_out = open_splits(tmp_path / "EuroSAT_MS", 0.2, 0)
    assert (len(train), len(held_out)) == (8, 2)
    with held_out.open(0) as file:
        found = open_image(file, Reading(in_chans=13, dtype="uint16"))
        assert (found.size, found.in_chans, found.dtype) == ((64, 64), 13, "uint16")
