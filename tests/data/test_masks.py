import io
import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.masks import IGNORED, MaskClasses, classes_of, nearest, read_mask

VALUES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3


def bytes_of(save, **options):
    file = io.BytesIO()
    save(file, **options)
    file.seek(0)
    return file


def palette(values):
    image = Image.fromarray(values, "P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    return image


@pytest.mark.parametrize(
    ("save", "options", "dtype"),
    [
        (Image.fromarray(VALUES).save, {"format": "PNG"}, np.uint8),
        (Image.fromarray(VALUES).save, {"format": "TIFF"}, np.uint8),
        (Image.fromarray(VALUES.astype(np.uint16) * 300).save, {"format": "PNG"}, np.uint16),
        (lambda file, **options: palette(VALUES).save(file, **options), {"format": "PNG"}, np.uint8),
        (lambda file: np.save(file, VALUES.astype(np.int64)), {}, np.int64),
        (lambda file: np.save(file, VALUES[..., None]), {}, np.uint8),
        (lambda file: np.savez(file, mask=VALUES), {}, np.uint8),
        (lambda file: tifffile.imwrite(file, VALUES.astype(np.uint32), compression="zlib"), {}, np.uint32),
        (lambda file: tifffile.imwrite(file, VALUES.astype(np.int16)), {}, np.int16),
    ],
)
def test_values_come_as_they_were_stored(save, options, dtype):
    values = read_mask(bytes_of(save, **options))
    assert (values == (VALUES.astype(np.uint16) * 300 if dtype == np.uint16 else VALUES)).all()
    assert values.shape == VALUES.shape


def test_a_mask_is_turned_as_its_own_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (read_mask(bytes_of(Image.fromarray(VALUES).save, format="PNG", exif=exif)) == np.rot90(VALUES, -1)).all()


def test_a_mask_may_be_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert read_mask(bytes_of(Image.fromarray(VALUES).save, format="PNG")).shape == (3, 4)


def test_a_mask_of_yes_and_no():
    assert read_mask(bytes_of(Image.fromarray(VALUES == 1).save, format="PNG")).tolist() == (VALUES == 1).tolist()
    assert read_mask(VALUES == 1).dtype == np.uint8


@pytest.mark.parametrize(
    ("save", "options", "message"),
    [
        (Image.fromarray(VALUES).save, {"format": "JPEG"}, "can't be a JPEG"),
        (
            Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save,
            {"format": "PNG"},
            "Pillow's mode RGB: save the numbers in one channel",
        ),
        (lambda file: np.save(file, VALUES / 2), {}, "float64 values"),
        (lambda file: np.save(file, np.zeros((3, 4, 2), int)), {}, re.escape("shape [3, 4, 2]")),
        (lambda file: np.savez(file, a=VALUES, b=VALUES), {}, "holds the arrays a, b"),
        (lambda file: file.write(b"no image at all"), {}, "cannot identify"),
    ],
)
def test_what_is_no_mask_is_named(save, options, message):
    with pytest.raises(OSError, match=message):
        read_mask(bytes_of(save, **options))


def test_labels_and_back():
    classes = MaskClasses((0, 7, 300), ("a", "b", "c"), (255,))
    mask = np.array([[300, 0], [255, 7]])
    labels = classes.labels(mask)
    assert labels.dtype == np.int16
    assert labels.tolist() == [[2, 0], [IGNORED, 1]]
    assert classes.mask(np.array([[2, 0]])).tolist() == [[300, 0]]
    assert classes.mask(labels.clip(0)).dtype == np.uint16
    for wrong in (8, 1000, -3):
        with pytest.raises(OSError, match=f"has the value {wrong}, which is none"):
            classes.labels(np.array([[0, wrong]]))


def test_the_nearest_pixel_of_a_box():
    mask = np.arange(35).reshape(5, 7)
    box, size = (1, 0, 6, 4), (8, 3)
    expected = [
        [mask[int((row + 0.5) * 4 / 8), 1 + int((column + 0.5) * 5 / 3)] for column in range(3)] for row in range(8)
    ]
    assert nearest(mask, box, size).tolist() == expected
    assert (nearest(mask, (0, 0, 7, 5), (5, 7)) == mask).all()


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ({255}, None, "0 values that are not ignored: two are needed at least, unless `ignore=none` takes 255"),
        ({0, 255}, None, "1 values that are not ignored"),
        ({-1, 0, 1}, None, "the value -1: give it to `ignore`"),
        (set(range(1002)), None, "are these numbers of objects"),
        ({0, 1, 70000}, None, "up to 70000"),
        ({0, 1, 2, 255}, ("a", "b"), "`class_names` has 2 names, and the masks have 3 classes: 0, 1, 2"),
    ],
)
def test_values_that_are_no_classes(values, names, message):
    with pytest.raises(UserError, match=message):
        classes_of(values, (255,), names)
