"""Photographs: 8 bits, upright, RGB or greyscale, read by Pillow, and at a reduced scale where that will do."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # the extra jpeg
    simplejpeg = None

from sparse_fcmae.data.decoders.image import ArrayImage, Box, OpenImage, Reading, counted
from sparse_fcmae.data.decoders.pages import open_stack
from sparse_fcmae.data.format import BYTE

REDUCIBLE = ("JPEG", "MPO")  # formats that can be decoded at 1/2, 1/4 or 1/8 of their sides
COMPOSED = ("MPO", "PSD")  # formats whose further images are previews or layers, and no frames
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # its values for which rows become columns
MIRRORED_COLUMNS, MIRRORED_ROWS = (2, 3, 6, 7), (3, 4, 7, 8)  # and for which columns or rows come in reverse
TURNS = range(2, 9)  # all values that mean something but upright
LEAST_REDUCTION = 2  # by which JPEGs can be decoded smaller

GREY = ("1", "L", "LA", "La")  # modes that hold no colour
NETPBM = re.compile(rb"P[56](?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+\d+(?:\s|#[^\n]*\n)+(\d+)")
JP2, JP2_DEPTH = b"\0\0\0\x0cjP", 14  # how a JPEG 2000 file begins, and where its depth stands behind "ihdr"
CODESTREAM, CODESTREAM_DEPTH = b"\xff\x4f\xff\x51", 42
FINER = 2  # a crop decoded at a reduced scale has at least this many times the view's pixels a side: fewer would show


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


class Photograph(OpenImage):
    """An image of 8 bits that Pillow has open."""

    is_photograph = True
    dtype = "uint8"

    def __init__(self, image: Image.Image, reading: Reading) -> None:
        reading.check_size(*image.size)
        if image.format not in REDUCIBLE:  # turned at once, as some formats' readers turn themselves when they decode
            ImageOps.exif_transpose(image, in_place=True)
        self.image, self.reading, self.size = image, reading, upright_size(image)
        self.file, self.decoded_scale = getattr(image, "fp", None), None
        self.whole: Tensor | None = None
        self.in_chans = 1 if image.mode in GREY or _has_grey_palette(image) else 3

    @of_any_size()
    def resized_crop(self, box: Box, size: tuple[int, int]) -> Tensor:
        """Resampling is bicubic with antialiasing. Torch does it where it can, in a fifth of Pillow's time."""
        reading = self.reading
        if reading.dtype != self.dtype:
            raise OSError(f"has {self.dtype} values, not {reading.dtype}")
        in_chans = 3 if reading.channels else reading.in_chans
        if in_chans not in (1, 3):
            raise OSError(f"has {counted(self.in_chans)}, not {in_chans}")
        height, width = size
        shrink = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
        reducing = self.image.format in REDUCIBLE and shrink / FINER >= LEAST_REDUCTION
        if self.file and self.decoded_scale and (reducing or self.decoded_scale != 1):  # for a crop of another scale
            self.file.seek(0)
            self.image = opened(self.file)
        whole = self._decoded_by_turbo(in_chans, shrink / FINER)
        decoded = decode(self.image, shrink / FINER) if whole is None else None
        self.decoded_scale = decoded.scale if decoded else self.decoded_scale
        if decoded is None or decoded.scale == 1:
            left, top, right, bottom = box
            if decoded:
                crop = to_tensor(to_eight_bits(decoded.image.crop(box), in_chans))
            else:
                crop = whole[top:bottom, left:right]
            crop = crop[None].movedim(-1, 1)  # still channels last in memory
            pixels = F.interpolate(crop, size, mode="bicubic", antialias=True)[0].movedim(0, -1).contiguous()
        else:  # the box lies between pixels, which only Pillow allows
            eight_bits = to_eight_bits(decoded.image, in_chans)
            pixels = to_tensor(eight_bits.resize((width, height), Image.Resampling.BICUBIC, box=decoded.place(box)))
        return torch.from_numpy(reading.selected(pixels.numpy())) if reading.channels else pixels

    def _decoded_by_turbo(self, in_chans: int, shrink: float) -> Tensor | None:
        """All pixels [H, W, 3] of an upright JPEG in colour that is not to be reduced, where simplejpeg is installed.

        They are those that Pillow decodes, in two thirds of its time. None where Pillow has to do it, which also says
        what is wrong with a damaged file.
        """
        image = self.image
        usual = image.format == "JPEG" and image.mode == "RGB" and in_chans == 3 and _orientation(image) not in TURNS
        if simplejpeg is None or not usual or image.fp is None or shrink >= LEAST_REDUCTION:
            return None
        if self.whole is None:
            place = image.fp.tell()
            image.fp.seek(0)
            try:
                self.whole = torch.from_numpy(simplejpeg.decode_jpeg(image.fp.read()))
            except ValueError:
                return None
            finally:
                image.fp.seek(place)
        return self.whole

    @of_any_size()
    def decode_all(self) -> None:
        self.image.load()


def _has_grey_palette(image: Image.Image) -> bool:
    colours = image.getpalette() if image.mode == "P" else None
    return bool(colours) and colours[::3] == colours[1::3] == colours[2::3]


@of_any_size()
def opened(file: BinaryIO) -> Image.Image:
    """An image that Pillow knows. Raises OSError for what is none."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:  # its message shows Python's name for an open file
        raise UnidentifiedImageError("no image of a known format") from None


def open_image(file: BinaryIO, head: bytes, reading: Reading) -> OpenImage:
    """The image in a file of any format that Pillow knows.

    head: how the file begins. Raises OSError for what is no image, and for values that Pillow would not keep.
    """
    image, greatest = opened(file), _greatest_value(head)
    kept = image.mode.startswith("I") and greatest == (1 << 16) - 1
    if greatest > BYTE and not kept:
        raise OSError(f"has values up to {greatest} in {image.format}, which would not be kept: save it as PNG or TIFF")
    return from_pillow(image, reading)


def _greatest_value(head: bytes) -> int:
    """The greatest value that a PPM, PGM or JPEG 2000 file of such a beginning can hold, 255 for other formats."""
    if netpbm := NETPBM.match(head):
        return int(netpbm[1])
    place = head.find(b"ihdr") + JP2_DEPTH if head.startswith(JP2) else CODESTREAM_DEPTH
    if head.startswith((JP2, CODESTREAM)) and len(head) > place:
        return (1 << (head[place] & 0x7F) + 1) - 1
    return BYTE


class Frames:
    """The frames of an animation as a stack, in colour."""

    dtype = np.dtype("uint8")

    def __init__(self, image: Image.Image) -> None:
        width, height = upright_size(image)
        self.image, self.shape = image, (image.n_frames, height, width, 3)

    def __getitem__(self, place: tuple[slice, slice, slice]) -> np.ndarray:
        frames, rows, columns = place
        return np.stack([self._frame(number)[rows, columns] for number in range(self.shape[0])[frames]])

    def _frame(self, number: int) -> np.ndarray:
        self.image.seek(number)
        return to_tensor(to_eight_bits(ImageOps.exif_transpose(self.image), self.shape[-1])).numpy()


def from_pillow(image: Image.Image, reading: Reading) -> OpenImage:
    """A photograph, or where the mode has more than 8 bits an image whose values are kept.

    The frames of an animation are its pages. Each by itself is a photograph.
    """
    if image.format in COMPOSED or not getattr(image, "is_animated", False):
        return _of_one_frame(image, reading)
    reading.check_size(*image.size)
    stack = open_stack(Frames(image), reading, "frames")
    if reading.pages != "images":
        return stack
    image.seek(reading.page)
    photograph = _of_one_frame(image, reading)
    photograph.pages = stack.pages
    return photograph


@of_any_size()
def _of_one_frame(image: Image.Image, reading: Reading) -> OpenImage:
    photograph = not image.mode.startswith(("I", "F"))
    if photograph and reading.nodata is None:
        return Photograph(image, reading)
    reading.check_size(*image.size)
    if photograph:  # with missing values it is one no more
        channels = Photograph(image, reading).in_chans
        values = to_tensor(to_eight_bits(ImageOps.exif_transpose(image), channels)).numpy()
        return ArrayImage(values, reading)
    values = np.asarray(ImageOps.exif_transpose(image))
    return ArrayImage(values[..., None], reading)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image, turned as its EXIF orientation says."""
    return image.size[::-1] if _orientation(image) in TURNED else image.size


def decode(image: Image.Image, shrink: float = 1.0) -> Decoded:
    """Decodes an opened image, upright.

    shrink: by how much its sides may be reduced on the way. What is done is the next less that the format allows.
    """
    (width, height), orientation, scale = upright_size(image), _orientation(image), 1.0
    if image.format in REDUCIBLE:
        scale = _reduce(image, shrink)
        ImageOps.exif_transpose(image, in_place=True)
    image.load()
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
    """RGB (3 channels) or greyscale (1) of an image in any mode of 8 bits.

    Transparent pixels become white.
    """
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_tensor(image: Image.Image) -> Tensor:
    """The pixels of an image of 8 bits: uint8 [height, width, channels]."""
    array = np.array(image)  # a copy, as torch wants what it may write to
    return torch.from_numpy(array.reshape(*array.shape[:2], -1))
