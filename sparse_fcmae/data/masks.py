"""Masks: images whose pixels are numbers of classes, as segmentation has them for labels."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sparse_fcmae.data.decoders import File, arrays, dicom, open_image, tiff
from sparse_fcmae.data.decoders.arrays import InMemory
from sparse_fcmae.data.decoders.image import ArrayImage, Box, Reading
from sparse_fcmae.data.decoders.photograph import of_any_size
from sparse_fcmae.runtime.errors import UserError

HEAD = 132  # bytes that tell the kind of a file
IGNORED = -1  # the label of pixels that do not count
WHOLE_NUMBERS = ("1", "P", "L", "I", "I;16", "I;16B")  # modes of Pillow's of which a pixel is one whole number
MOST_CLASSES = 1000


@dataclass(frozen=True)
class MaskClasses:
    """The classes of masks' pixels.

    values: the value that each class has in masks, ascending. names: of the classes. ignored: values of pixels that do
    not count.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    ignored: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def labels(self, mask: np.ndarray) -> np.ndarray:
        """The values of a mask [H, W] as places of their classes, int16 [H, W]; IGNORED where pixels do not count.

        Raises OSError for a value that is no class.
        """
        values = np.array([*self.values, *self.ignored])
        labels = np.array([*range(len(self.values)), *[IGNORED] * len(self.ignored)], dtype=np.int16)
        order = values.argsort()
        place = np.searchsorted(values[order], mask).clip(max=len(values) - 1)
        known = values[order][place] == mask
        if not known.all():
            raise OSError(f"its mask has the value {mask[~known][0]}, which is none of the classes' and not ignored")
        return labels[order][place]

    def mask(self, labels: np.ndarray) -> np.ndarray:
        """Places of classes [H, W] as values of a mask: uint8, or uint16 where a class has a value beyond 255."""
        values = np.array(self.values)
        return values.astype(np.uint8 if values.max() <= 255 else np.uint16)[labels]


def read_mask(file: File) -> np.ndarray:
    """The values of a mask, whole numbers of any dtype, [H, W].

    file: as `open_image` takes it; of a PNG with a palette the values are its indices. It is turned upright as its own
    EXIF says. Raises OSError for what is no mask, such as an image in colour.
    """
    if isinstance(file, InMemory):
        file = file.image
    if isinstance(file, Image.Image):
        return _of_pillow(file)
    if isinstance(file, np.ndarray):
        return _checked(file)
    if not hasattr(file, "read"):
        return _of_array(file)
    head = file.read(HEAD)
    file.seek(0)
    if arrays.recognises(head):
        return _checked(_only_array(file))
    if dicom.recognises(head):
        return _of_array(file)
    try:
        with of_any_size(), Image.open(file) as image:
            return _of_pillow(image)
    except OSError:
        if not tiff.recognises(head):
            raise
        file.seek(0)
        return _of_array(file)


def _of_pillow(image: Image.Image) -> np.ndarray:
    if image.format == "JPEG":
        raise OSError("a mask can't be a JPEG, which changes the numbers of classes: save it as PNG")
    if image.mode not in WHOLE_NUMBERS:
        raise OSError(
            f"a mask has one number a pixel, and this is of Pillow's mode {image.mode}: save the numbers in one channel"
        )
    return _checked(np.asarray(ImageOps.exif_transpose(image)))


def _only_array(file: Any) -> np.ndarray:
    """The array in a .npy or .npz file, which may have dtypes that images have not."""
    try:
        values = np.load(file, allow_pickle=False)
    except ValueError as error:
        raise OSError(f"no array that can be read: {error}") from None
    if isinstance(values, np.ndarray):
        return values
    if len(values.files) != 1:
        raise OSError(f"holds the arrays {', '.join(values.files)}: save the mask alone")
    return values[values.files[0]]


def _of_array(file: Any) -> np.ndarray:
    image = open_image(file, Reading(in_chans=1))
    if not isinstance(image, ArrayImage):
        raise OSError("a mask has one number a pixel, and this is a photograph")
    width, height = image.size
    return _checked(np.asarray(image.values[0:height, 0:width]))


def _checked(values: np.ndarray) -> np.ndarray:
    """Values [H, W] or [H, W, 1] of a mask as [H, W]."""
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise OSError(f"a mask has one number a pixel, and this has the shape {list(values.shape)}")
    if values.dtype.kind not in "bui":
        raise OSError(f"a mask holds whole numbers, and this holds {values.dtype.name} values")
    return values.astype(np.uint8) if values.dtype.kind == "b" else values


def nearest(mask: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """A box of a mask [H, W] in a size (height, width), each pixel with the value of the nearest."""
    left, top, right, bottom = box
    rows = top + ((np.arange(size[0]) + 0.5) * (bottom - top) / size[0]).astype(np.int64)
    columns = left + ((np.arange(size[1]) + 0.5) * (right - left) / size[1]).astype(np.int64)
    return mask[rows[:, None], columns]


def classes_of(values: Iterable[int], ignored: tuple[int, ...], names: tuple[str, ...] | None) -> MaskClasses:
    """The classes of the values that masks have, in ascending order. names: theirs, None for the values themselves.

    Raises UserError for negative or too many values, and where there are not as many names.
    """
    found = tuple(sorted(set(map(int, values)) - set(ignored)))
    if len(found) < 2:
        unless = f", unless `ignore=none` takes {', '.join(map(str, ignored))} for one" if ignored else ""
        raise UserError(f"the masks have {len(found)} values that are not ignored: two are needed at least{unless}")
    if found[0] < 0:
        raise UserError(f"the masks have the value {found[0]}: give it to `ignore`, or number classes from 0")
    if len(found) > MOST_CLASSES or found[-1] > 65535:
        raise UserError(
            f"the masks have {len(found)} values up to {found[-1]}: are these numbers of objects, not of classes?"
        )
    if names is not None and (len(set(names)) < len(names) or not all(names)):
        raise UserError("`class_names` has a name twice, or an empty one: give each class its own")
    if names is not None and len(names) != len(found):
        shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        raise UserError(f"`class_names` has {len(names)} names, and the masks have {len(found)} classes: {shown}")
    return MaskClasses(found, names or tuple(map(str, found)), ignored)
