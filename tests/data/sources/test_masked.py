"""Images and masks in the layouts that people have them in."""

import csv
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.config import MaskConfig
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.masks import read_mask
from sparse_fcmae.data.sources.masked import open_masked, open_masked_held_out, open_masked_splits, survey_masks


def pair(image, mask, value, size=(8, 6)):
    """Writes an image and its mask, both of one value."""
    for path, values in ((image, np.full((size[1], size[0], 3), value)), (mask, np.full((size[1], size[0]), value))):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(path)


def check(images, values):
    """Whether each image has the mask that was written with it, in this order."""
    found = []
    for index in range(len(images)):
        with images.open(index) as opened:
            found.append(int(read_mask(opened.mask)[0, 0]))
            assert int(np.asarray(Image.open(opened.image))[0, 0, 0]) == found[-1]
    assert found == values


LAYOUTS = {
    "split above": ("{split}/images/{name}.png", "{split}/masks/{name}.png", {}),
    "ADE20K": ("images/{split}/{name}.bmp", "annotations/{split}/{name}.png", {}),
    "in one folder": ("img/{split}/sub/{name}.png", "labels/{split}/sub/{name}.tif", {}),
    "Cityscapes": (
        "leftImg8bit/{split}/ulm/{name}_leftImg8bit.png",
        "gtFine/{split}/ulm/{name}_gtFine_labelTrainIds.png",
        {"data": "leftImg8bit", "masks": "gtFine", "mask_name": "leftImg8bit=gtFine_labelTrainIds"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders(tmp_path, layout):
    image, mask, options = LAYOUTS[layout]
    names = ("training", "validation") if layout == "ADE20K" else ("train", "val")
    for number, (split, name) in enumerate([(names[0], "a"), (names[0], "b"), (names[1], "a")]):
        place = {"split": split, "name": name}
        pair(tmp_path / image.format(**place), tmp_path / mask.format(**place), 40 + number)
        if layout == "Cityscapes":  # other files that are no masks to take
            pair(tmp_path / "spare.png", tmp_path / mask.format(**place).replace("labelTrainIds", "color"), 99)
    (tmp_path / "spare.png").unlink(missing_ok=True)
    options = dict(options)
    data = tmp_path / options.pop("data", "")
    if "masks" in options:
        options["masks"] = str(tmp_path / options["masks"])
    train, val = open_masked_splits(str(data), MaskConfig(**options), None, 0)
    check(train, [40, 41])
    check(val, [42])
    check(open_masked_held_out(str(data), MaskConfig(**options)), [42])
    assert survey_masks(train, Reading()) == {40: 48, 41: 48}  # of 8 x 6 pixels each


def test_tables(tmp_path):
    rows = [("train", 1), ("val", 2), ("train", 3)]
    for _, value in rows:
        pair(tmp_path / f"x{value}.png", tmp_path / f"deep/y{value}.png", value)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "annotation", "split"), *((f"x{v}.png", f"deep/y{v}.png", split) for split, v in rows)]
        )
    train, val = open_masked_splits(str(tmp_path / "table.csv"), MaskConfig(), None, 0)
    check(train, [1, 3])
    check(val, [2])
    train, val = open_masked_splits(str(tmp_path / "table.csv"), MaskConfig(mask_column="annotation"), None, 0)
    check(val, [2])
    with pytest.raises(UserError, match="`masks` goes with a folder"):
        open_masked(str(tmp_path / "table.csv"), MaskConfig(masks=str(tmp_path)))
    with pytest.raises(UserError, match="`mask_column` x is none"):
        open_masked(str(tmp_path / "table.csv"), MaskConfig(mask_column="x"))
    (tmp_path / "table.csv").write_text("file,mask,split\nx1.png,deep/y1.png,train\nx2.png,deep/y1.png,trian\n")
    assert len(open_masked(str(tmp_path / "table.csv"), MaskConfig()).images) == 2  # which share a mask
    with pytest.raises(UserError, match="the split trian is none of train, val and test: rename it"):
        open_masked_splits(str(tmp_path / "table.csv"), MaskConfig(), None, 0)
    (tmp_path / "table.csv").write_text("file,split\nx1.png,train\n")
    with pytest.raises(UserError, match="no column of masks, as mask, mask_path, annotation: name it by `mask_column`"):
        open_masked(str(tmp_path / "table.csv"), MaskConfig())


def test_data_sets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    for value in range(4):
        pair(tmp_path / f"x{value}.png", tmp_path / f"y{value}.png", value)
    columns = {
        "image": [str(tmp_path / f"x{v}.png") for v in range(4)],
        "annotation": [str(tmp_path / f"y{v}.png") for v in range(4)],
        "split": ["train", "train", "train", "validation"],
    }
    parts = {
        name: datasets.Dataset.from_dict({k: v[:1] for k, v in columns.items() if k != "split"})
        for name in ("train", "extra")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "others")
    found = open_masked(str(tmp_path / "others"), MaskConfig()).part("train")
    assert "left out, as these are in none of train, val and test: 1 of extra" in found.source.notes
    data = datasets.Dataset.from_dict(columns)
    data = data.cast_column("image", datasets.Image()).cast_column("annotation", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    train, val = open_masked_splits(str(tmp_path / "saved"), MaskConfig(), None, 0)
    check(train, [0, 1, 2])
    check(val, [3])


def test_archives(tmp_path):
    for number, (split, names) in enumerate({"train": ("a", "b.rgb"), "val": ("a",)}.items()):
        with tarfile.open(tmp_path / f"{split}-000.tar", "w") as archive:
            for value, name in enumerate(names, 10 * number):
                key = name.split(".")[0]
                pair(tmp_path / "image.png", tmp_path / "mask.png", value)
                archive.add(tmp_path / "mask.png", f"sub/{key}.Seg.png")  # before its image, whose order counts
                archive.add(tmp_path / "image.png", f"sub/{name}.png")
    with tarfile.open(tmp_path / "train-000.tar", "a") as archive:
        archive.add(tmp_path / "mask.png", "c.mask.png")
    data = str(tmp_path / "{train,val}-000.tar")
    train, val = open_masked_splits(data, MaskConfig(), None, 0)
    check(train, [0, 1])
    check(val, [10])
    for images in (open_masked(data, MaskConfig()).images, train, val):
        assert any("masks of no image: 1 files" in note for note in images.notes)
    with pytest.raises(UserError, match="`mask_name` goes with folders"):
        open_masked(data, MaskConfig(mask_name="rgb=label"))
    for column in ("mask_column", "label_column"):
        with pytest.raises(UserError, match=f"`{column}` goes with a table"):
            open_masked(data, MaskConfig(**{column: "mask"}))
    with pytest.raises(UserError, match=r"`masks` goes with a folder of images: in .* the mask of 7.jpg is 7.mask.png"):
        open_masked(data, MaskConfig(masks=str(tmp_path)))
    for name, message in (
        ("d.png", r"1 of 3 images have no mask, such as train-000.tar/d.png: the mask of 7.jpg is called 7.mask.png"),
        ("c.seg.png", "train-000.tar/c.mask.png and train-000.tar/c.seg.png are masks of one image"),
        ("sub/a.bmp", "train-000.tar/sub/a.png and train-000.tar/sub/a.bmp are images of one sample"),
    ):
        more = tmp_path / f"with {os.path.basename(name)}" / "train-000.tar"
        more.parent.mkdir()
        shutil.copy(tmp_path / "train-000.tar", more)
        with tarfile.open(more, "a") as archive:
            archive.add(tmp_path / "image.png", name)
        with pytest.raises(UserError, match=message):
            open_masked(str(more), MaskConfig())


def test_a_random_part_is_held_out(tmp_path):
    for value in range(10):
        pair(tmp_path / f"images/{value}.png", tmp_path / f"masks/{value}.png", value)
    train, val = open_masked_splits(str(tmp_path), MaskConfig(), 0.3, 0)
    assert (len(train), len(val)) == (7, 3)
    values = set(survey_masks(train, Reading())), set(survey_masks(val, Reading()))
    assert values[0] | values[1] == set(range(10))
    assert not values[0] & values[1]
    assert len(open_masked_held_out(str(tmp_path), MaskConfig())) == 10
    with pytest.raises(UserError, match="no images of the split train"):
        open_masked_splits(str(tmp_path), MaskConfig(), None, 0)
    with pytest.raises(UserError, match="leaves no image to train on"):
        open_masked_splits(str(tmp_path), MaskConfig(), 0.99, 0)


def test_masks_below_the_images_and_spare_ones(tmp_path):
    for value in range(3):
        pair(tmp_path / f"{value}.png", tmp_path / f"truth/{value}.png", value)
    Image.new("L", (8, 6)).save(tmp_path / "truth" / "spare.png")
    (tmp_path / "runs/a/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/a/config.json").write_text('{"format": "sparse-fcmae fine-tuning run"}')
    Image.new("L", (8, 6)).save(tmp_path / "runs/a/loss.png")
    images = open_masked(str(tmp_path), MaskConfig(masks=str(tmp_path / "truth"))).images
    assert "left out, as they are runs: runs/a" in images.notes
    check(images, [0, 1, 2])
    assert any("masks of no image: 1 files" in note for note in images.notes)


def test_names_of_masks_and_images_beside_the_folders(tmp_path):
    pair(tmp_path / "rgb/images/1_rgb.png", tmp_path / "rgb/masks/1_label.png", 4)
    Image.new("L", (8, 6)).save(tmp_path / "overview.png")
    images = open_masked(str(tmp_path), MaskConfig(mask_name="rgb=label")).images
    check(images, [4])
    assert any("in no folder of images or of masks: 1 files" in note for note in images.notes)


def test_mistakes_are_named(tmp_path):
    for value in range(3):
        pair(tmp_path / f"images/{value}.png", tmp_path / f"masks/{value}.png", value)
    with pytest.raises(UserError, match="has no folders images and masks"):
        open_masked(str(tmp_path / "images"), MaskConfig())
    (tmp_path / "masks/1.png").rename(tmp_path / "masks/other.png")
    with pytest.raises(UserError, match=r"1 of 3 images have no mask in .*, such as images/1.png"):
        open_masked(str(tmp_path), MaskConfig())
    with pytest.raises(UserError, match="`mask_name` rgb: give what"):
        open_masked(str(tmp_path), MaskConfig(mask_name="rgb"))
    (tmp_path / "masks/other.png").rename(tmp_path / "masks/1.tif")
    Image.new("L", (8, 6)).save(tmp_path / "masks/1.bmp")
    with pytest.raises(UserError, match=r"masks/1.bmp and masks/1.tif are masks of one image"):
        open_masked(str(tmp_path), MaskConfig())
    (tmp_path / "masks/1.bmp").unlink()
    Image.new("L", (9, 6)).save(tmp_path / "masks/2.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "masks/0.png")
    with pytest.raises(UserError) as error:
        survey_masks(open_masked(str(tmp_path), MaskConfig()).images, Reading())
    assert "the mask of images/0.png: a mask has one number a pixel" in str(error.value)
    assert "the mask of images/2.png has 6x9 pixels, and its image 6x8" in str(error.value)
    pair(tmp_path / "images/train/9.png", tmp_path / "masks/train/9.png", 9)
    with pytest.raises(UserError, match="is in no split, and others are"):
        open_masked(str(tmp_path), MaskConfig())
