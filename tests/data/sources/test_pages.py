"""Pages that are images of their own, against the arrays that were written."""

import os

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from sparse_fcmae import UserError
from sparse_fcmae.data.batches import EvaluationImages, make_loader
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders import open_image, tiff
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.class_folder import class_folder
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.sources.pages import Pages, labelled_by_page
from sparse_fcmae.data.sources.windows import Windows
from sparse_fcmae.data.views import CentreView, NativeView

STACK = np.random.default_rng(0).integers(0, 4096, (6, 20, 30)).astype(np.uint16)
IMAGES = Reading(1, "uint16", pages="images")


def pixels(source, index, reading):
    with source.open(index) as file:
        image = open_image(file, reading)
        width, height = image.size
        return image.resized_crop((0, 0, width, height), (height, width)).numpy()


def write(folder, kind):
    """The stack as a file or folder of a kind. Returns its name."""
    path = folder / f"x.{kind}"
    if kind == "npy":
        np.save(path, STACK)
    elif kind == "npz":
        np.savez_compressed(path, STACK)
    elif kind == "zarr":
        zarr.create_array(str(path), data=STACK, chunks=(1, 8, 8))
    else:
        packed = {"tif": None, "tiff": "deflate"}[kind]
        tifffile.imwrite(path, STACK, photometric="minisblack", compression=packed, metadata={"axes": "ZYX"})
    return path.name


@pytest.mark.parametrize("kind", ["tif", "tiff", "npy", "npz", "zarr"])
def test_each_page_is_an_image(tmp_path, kind):
    name = write(tmp_path, kind)
    source = Pages(open_images(tmp_path), IMAGES, 0)
    assert len(source) == 6
    assert (source.name(0), source.name(5)) == (f"{name} page 1", f"{name} page 6")
    assert source.notes == ["6 pages in 1 files, each an image of its own"]
    for number in range(6):
        assert np.array_equal(pixels(source, number, IMAGES)[..., 0], STACK[number])
    with (
        open_images(tmp_path).open(0) as file,
        pytest.raises(OSError, match=r"has 6 pages.*, each an image: say"),
    ):
        open_image(file, IMAGES)


def test_pages_of_several_files_and_one_that_has_changed(tmp_path):
    np.save(tmp_path / "a.npy", STACK[:2])
    np.save(tmp_path / "b.npy", STACK[2])
    np.save(tmp_path / "c.npy", STACK[3:])
    (tmp_path / "d.npy").write_text("no array")
    with pytest.raises(UserError, match=r"1 of 4 images are unreadable, such as d.npy"):
        Pages(open_images(tmp_path), IMAGES, 0.1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.npy").write_text("no array")
    with pytest.raises(UserError, match=r"none of its 1 images can be read, such as x.npy"):
        Pages(open_images(tmp_path / "bad"), IMAGES, 1.0)
    (tmp_path / "bad" / "x.npy").unlink()
    source = Pages(open_images(tmp_path), IMAGES, 0.5)
    for number in range(6):
        assert np.array_equal(pixels(source, number, IMAGES)[..., 0], STACK[number])
    assert "left out, as 1 of 4 images can't be read: d.npy" in source.notes[1]
    np.save(tmp_path / "c.npy", STACK[3:5])
    with pytest.raises(OSError, match="has 2 pages, and page 3 is to be read: has the file changed"):
        pixels(source, 5, IMAGES)


def test_pages_have_the_class_of_their_file(tmp_path):
    for name, pages in (("cat", STACK[:2]), ("dog", STACK[2:])):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", pages)
    images = labelled_by_page(class_folder(tmp_path), IMAGES)
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 1]
    part = images.take([5, 1])
    assert (part.labels.tolist(), part.name(0)) == ([1, 0], "dog/x.npy page 4")
    assert np.array_equal(pixels(part, 0, IMAGES)[..., 0], STACK[5])
    same = class_folder(tmp_path)
    assert labelled_by_page(same, Reading(1, "uint16")) is same
    assert torch.equal(same.labels, torch.tensor([0, 1]))


def test_frames_of_a_dicom_file(tmp_path):
    path = get_testdata_file("MR_small_RLE.dcm")  # one frame, in a file that begins as a TIFF
    assert open_image(path, Reading(1, "int16", pages="images")).pages == 1
    path = get_testdata_file("rtdose_rle.dcm")
    data = dcmread(path)
    whole = data.pixel_array * np.float64(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
    image = open_image(path, Reading(1, "uint16", pages="images", page=0))
    assert image.pages == len(whole) > 1
    reading = Reading(1, image.dtype, pages="images", page=3)
    image = open_image(path, reading)
    found = image.resized_crop((0, 0, *image.size), image.size[::-1])[..., 0].numpy()
    assert np.array_equal(found, whole[3].astype(found.dtype))
    with pytest.raises(OSError, match=r"has \d+ frames, each an image: say which"):
        open_image(path, Reading(1, image.dtype, pages="images"))


def test_pages_of_channel_files(tmp_path):
    for wave in (1, 2):
        np.save(tmp_path / f"x_w{wave}.npy", STACK + np.uint16(wave))
    reading = Reading(2, "uint16", pages="images")
    config = SourceConfig(channel_files=("{name}_w1.npy", "{name}_w2.npy"))
    source = Pages(open_images(tmp_path, config=config), reading, 0)
    assert len(source) == 6
    assert np.array_equal(pixels(source, 4, reading), np.stack([STACK[4] + 1, STACK[4] + 2], -1))
    np.save(tmp_path / "x_w2.npy", STACK[:3])
    with pytest.raises(UserError, match="has channels of 6, 3 pages"):
        Pages(open_images(tmp_path, config=config), reading, 0)


def test_windows_of_pages_open_each_file_once(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", STACK)
    np.save(tmp_path / "b.npy", STACK[:2])
    files, opened = open_images(tmp_path), []
    source = Pages(files, IMAGES, 0)
    monkeypatch.setattr(files, "open", lambda index: opened.append(index) or type(files).open(files, index))
    windows = Windows(source, NativeView((10, 10), IMAGES), 0)
    assert opened == [0, 1]
    assert len(windows) == 8 * 6
    assert (windows.name(0), windows.name(47)) == ("a.npy page 1", "b.npy page 2")


def test_palettes_are_no_values(tmp_path):
    pages = [Image.new("P", (8, 8), 1) for _ in range(3)]
    for page in pages:
        page.putpalette([0, 0, 0, 250, 10, 10])
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(OSError, match="has pages of palette colours: save them in grey or RGB"):
        open_image(tmp_path / "x.tif", IMAGES)


def test_zarr_folders_are_named_like_files(tmp_path):
    name = write(tmp_path, "zarr")
    for data in (tmp_path / name, f"{tmp_path / name}/", str(tmp_path / "*.zarr"), str(tmp_path / "**")):
        source = Pages(open_images(data), IMAGES, 0)
        assert (len(source), source.notes[:-1]) == (6, [])
        assert np.array_equal(pixels(source, 3, IMAGES)[..., 0], STACK[3])


def test_a_tiff_of_many_pages_is_parsed_once_a_process_until_it_changes(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "x.tif", STACK, photometric="minisblack", compression="deflate")
    source, parsed = Pages(open_images(tmp_path), IMAGES, 0), []
    parse = tiff._parse
    monkeypatch.setattr(tiff, "_parse", lambda file: parsed.append(file) or parse(file))
    tiff._kept.cache_clear()
    for number in range(6):
        assert np.array_equal(pixels(source, number, IMAGES)[..., 0], STACK[number])
    assert len(parsed) == 1
    images = EvaluationImages(source, CentreView((20, 30), IMAGES))
    (batch,) = make_loader(images, [list(range(6))], 2, pin_memory=False)  # in a process that is forked from this one
    assert np.array_equal(batch.pixels[..., 0].numpy(), STACK)
    tifffile.imwrite(tmp_path / "x.tif", STACK[::-1], photometric="minisblack", compression="deflate")
    os.utime(tmp_path / "x.tif", (1e9, 1e9))
    assert np.array_equal(pixels(source, 0, IMAGES)[..., 0], STACK[5])
