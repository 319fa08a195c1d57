from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.evaluation.run import EvaluationSet, EvaluationView, check_any, run_model

VIEW = EvaluationView(
    size=(8, 8),
    form=ImageFormat.imagenet(1),
    reading=Reading(1),
    crop_fraction=1.0,
    device=torch.device("cpu"),
    batch_size=2,
)


def images_in(folder, view=VIEW):
    source = ImageFolder(folder)
    return EvaluationSet(Labelled.by_names(source, ["x"] * len(source)), view)


def test_outputs_are_those_of_the_readable_images(tmp_path):
    for i in range(5):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("no picture")
    outputs, index, bad = run_model(images_in(tmp_path), lambda images: images.mean((2, 3)))
    assert index.tolist() == [0, 1, 2, 4]
    assert [image.name for image in bad] == ["3.png"]
    pixels = (50 * index).to(torch.uint8)[:, None, None, None].expand(4, 8, 8, 1)
    torch.testing.assert_close(outputs, ImageFormat.imagenet(1).normalise(pixels).mean((2, 3)))
    for i in range(5):
        (tmp_path / f"{i}.png").write_text("no picture")
    _, index, bad = run_model(images_in(tmp_path), lambda images: images)
    with pytest.raises(UserError, match=r"no image of .* is readable: 0\.png: no image of a known format"):
        check_any(index, bad, ImageFolder(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_under_native_windows_an_output_is_the_mean_over_those_that_cover_an_image(tmp_path, workers):
    """An image with one damaged window, and one that is smaller than a window, are left out and named once."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 4096, (40, 60)).astype(np.uint16)
    small, damaged = np.zeros((8, 60), np.uint16), rng.integers(0, 4096, (64, 64)).astype(np.uint16)
    layout = {"tile": (16, 16), "compression": "zlib", "photometric": "minisblack"}
    for name, values in (("a", damaged), ("b", small), ("c", whole), ("d", whole[:32, :32])):
        tifffile.imwrite(tmp_path / f"{name}.tif", values, **layout)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        place, size = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[place : place + size] = bytes(size)
    (tmp_path / "a.tif").write_bytes(data)

    form = ImageFormat("uint16", (1000.0,), (10.0,))
    view = replace(
        VIEW, size=(32, 32), form=form, reading=Reading(1, "uint16"), batch_size=3, num_workers=workers, native=True
    )
    images = images_in(tmp_path, view)
    for _ in range(2):  # a set can be run over again
        outputs, index, bad = run_model(images, lambda images: images.square().mean((2, 3)))
        assert index.tolist() == [2, 3]
        assert sorted(image.name for image in bad) == ["a.tif", "b.tif"]
    exact = (whole.astype(float) - 1000) / 10
    windows = [np.square(exact[top : top + 32, left : left + 32]).mean() for top in (0, 8) for left in (0, 28)]
    assert outputs[:, 0].tolist() == pytest.approx([np.mean(windows), windows[0]], rel=1e-6)


def test_a_set_in_which_nothing_can_be_seen_is_empty(tmp_path):
    """As the part of one rank may be, whose images are all smaller than a window."""
    view = replace(VIEW, size=(32, 32), native=True)
    for number in range(2):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    outputs, index, bad = run_model(images_in(tmp_path, view), lambda images: images)
    assert (len(outputs), len(index), [image.name for image in bad]) == (0, 0, ["0.png", "1.png"])
    none = EvaluationSet(images_in(tmp_path, view).source.take([]), view)
    assert [len(found) for found in run_model(none, lambda images: images)] == [0, 0, 0]
