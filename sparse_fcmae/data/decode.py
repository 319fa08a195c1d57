"""From an image's file to its pixels: 8 bits, upright, RGB or greyscale, and at a reduced scale where that will do."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sparse_fcmae.data.config import MAX_MEGAPIXELS

REDUCIBLE = ("JPEG", "MPO")  # formats that can be decoded at 1/2, 1/4 or 1/8 of their sides
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # its values for which rows become columns
MIRRORED_COLUMNS, MIRRORED_ROWS = (2, 3, 6, 7), (3, 4, 7, 8)  # and for which columns or rows come in reverse

File = BinaryIO | str | os.PathLike | Image.Image  # an image that can be opened, or one that is open


class Decoded(NamedTuple):
    """An image, and where the pixels of its file are in it.

    scale: the sides of the image relative to those in the file. left, top: where the file's corner is. These are not 0
    where a mirrored image was reduced from sides that the scale does not divide.
    """

    image: Image.Image
    scale: float
    left: float
    top: float

    def place(self, box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """Where a box (left, top, right, bottom) of the file's upright image lies in this one."""
        x0, y0, x1, y1 = (self.scale * side for side in box)
        return x0 + self.left, y0 + self.top, x1 + self.left, y1 + self.top


@contextmanager
def of_any_size() -> Iterator[None]:
    """Lifts Pillow's guard against large images, which warns from 89 megapixels on and refuses twice as many.

    Pillow asks it when a file is opened, for some formats when it is decoded, and when a box is cut out.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@of_any_size()
def open_image(file: File, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """An image whose size is known and whose pixels are not, unless its format has to be decoded at once.

    Raises OSError for what is no image, and for an image of more than `max_megapixels`.
    """
    try:
        image = file if isinstance(file, Image.Image) else Image.open(file)
    except UnidentifiedImageError:  # its message shows Python's name for an open file
        raise UnidentifiedImageError("no image of a known format") from None
    if (megapixels := image.width * image.height / 1e6) > max_megapixels:
        raise OSError(f"it has {megapixels:.4g} megapixels, more than the {max_megapixels:.4g} of --max-megapixels")
    if image.format not in REDUCIBLE:  # turned at once, as some formats' readers turn by themselves when they decode
        ImageOps.exif_transpose(image, in_place=True)
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image, turned as its EXIF orientation says."""
    return image.size[::-1] if _orientation(image) in TURNED else image.size


def decode(image: Image.Image, in_chans: int, shrink: float = 1.0) -> Decoded:
    """Decodes an opened image to RGB (3 channels) or greyscale (1), upright.

    shrink: by how much its sides may be reduced on the way. What is done is the next less that the format allows.
    """
    (width, height), orientation, scale = upright_size(image), _orientation(image), 1.0
    if image.format in REDUCIBLE:
        scale = _reduce(image, shrink)
        ImageOps.exif_transpose(image, in_place=True)
    image = to_eight_bits(image, in_chans)
    left = image.width - scale * width if orientation in MIRRORED_COLUMNS else 0.0
    top = image.height - scale * height if orientation in MIRRORED_ROWS else 0.0
    return Decoded(image, scale, left, top)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ORIENTATION, 1)  # files have other values too, which mean nothing


def _reduce(image: Image.Image, shrink: float) -> float:
    """Has a JPEG be decoded at the smallest scale that is not below 1 / `shrink`. Returns that scale."""
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width / shrink), math.ceil(height / shrink)))
    return drafted[1][2] / width if drafted else 1.0


def to_eight_bits(image: Image.Image, in_chans: int) -> Image.Image:
    """RGB (3 channels) or greyscale (1) of an image in any mode.

    Transparent pixels become white. Integers of two bytes lose the lower one. Floating-point values are stretched, so
    that the least becomes 0 and the greatest 255.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        two_bytes = image.mode != "I" or values.max() > 255
        image = Image.fromarray((values >> 8 if two_bytes else values).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        low, span = values.min(), max(float(np.ptp(values)), 1e-12)
        image = Image.fromarray(((values - low) * (255 / span)).round().astype(np.uint8))
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
