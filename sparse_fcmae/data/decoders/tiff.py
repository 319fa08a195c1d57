"""TIFF files: by Pillow those that are photographs of one page, all others by tifffile, with their values kept."""

import io
import logging
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sparse_fcmae.data.decoders import photograph
from sparse_fcmae.data.decoders.arrays import KNOWN
from sparse_fcmae.data.decoders.image import TURNS, ArrayImage, OpenImage, Reading, library
from sparse_fcmae.data.decoders.pages import AxesStack, Stack, open_stack
from sparse_fcmae.data.format import DTYPES

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # of damaged files
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT, NODATA = 258, 262, 284, 338, 339, 42113  # tags
ORIENTATION = 274
WHITE_IS_LEAST, PALETTE, CMYK, ALPHA = 0, 3, 5, (1, 2)  # values of PHOTOMETRIC and of EXTRA_SAMPLES
MASK = 4  # the bit of a page's type that says it is one, as GDAL writes it: 1 where there are values
OPEN_AT_ONCE = 16  # files of many pages that a process keeps open
FILE_OF_SET = re.compile(r'FileName="([^"]*)"')  # in OME's metadata


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is a TIFF or a BigTIFF."""
    return head.startswith(MAGIC)


def open_image(file: BinaryIO, reading: Reading) -> OpenImage:
    """The image in a file. Raises OSError where it holds something else, and MissingLibrary without tifffile."""
    for reader in ("tifffile", "PIL.TiffImagePlugin"):  # what is wrong with a file is raised or does not matter
        logging.getLogger(reader).setLevel(logging.CRITICAL)
    image = _opened_by_pillow(file)
    if image is not None:
        return photograph.from_pillow(image, reading)
    file.seek(0)
    tifffile = library("tifffile", "microscopy")
    try:
        return _image_of(_parsed(file, reading), file, reading)
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError) as error:
        if "imagecodecs" in str(error):
            library("imagecodecs", "microscopy")
        raise OSError(f"a TIFF that can't be read: {error}") from None


def _parsed(file: BinaryIO, reading: Reading) -> Any:
    """tifffile's view of an open file.

    Where each page of a file is read by itself, this is kept for the next ones, as it takes as long as there are pages.
    """
    if reading.pages == "images" and isinstance(file, io.BufferedReader) and isinstance(file.name, str):
        found = os.fstat(file.fileno())
        return _kept(os.path.abspath(file.name), found.st_mtime_ns, found.st_size, os.getpid())
    return _parse(file)


@lru_cache(OPEN_AT_ONCE)
def _kept(path: str, changed: int, size: int, process: int) -> Any:
    """A file that stays open, until it has another time of change or size, for one process, as its place moves."""
    return _parse(open(path, "rb"))


def _parse(file: BinaryIO) -> Any:
    tifffile = library("tifffile", "microscopy")
    tiff = tifffile.TiffFile(file)
    if tiff.is_ome and len(set(FILE_OF_SET.findall(tiff.ome_metadata))) > 1:  # each file is an image here
        file.seek(0)
        tiff = tifffile.TiffFile(file, is_ome=False)
    return tiff


def _opened_by_pillow(file: BinaryIO) -> Image.Image | None:
    """The image, where Pillow reads all that is in the file."""
    try:
        image = photograph.opened(file)
        alone = not image.is_animated  # `n_frames` would look at all of thousands of pages
    except (OSError, SyntaxError):  # the latter for pixels that it has no mode for
        return None
    bits = image.tag_v2.get(BITS, (1,))
    interleaved = image.tag_v2.get(PLANAR, 1) == 1 or len(bits) == 1
    whole = alone and NODATA not in image.tag_v2
    unsigned = set(image.tag_v2.get(SAMPLE_FORMAT, (1,))) == {1}
    cmyk, alpha = image.tag_v2.get(PHOTOMETRIC) == CMYK, image.tag_v2.get(EXTRA_SAMPLES, (0,))[0] in ALPHA
    of_colour = len(bits) in (1, 3) or (len(bits) == 4 and (cmyk or alpha))
    return image if max(bits) <= 8 and unsigned and of_colour and interleaved and whole else None


def _image_of(tiff: Any, file: BinaryIO, reading: Reading) -> OpenImage:
    """The image in the first series of an open file. Raises OSError where there are others as large."""
    series = tiff.series[0]
    masks = [s.keyframe for s in tiff.series[1:] if s.keyframe.subfiletype & MASK]
    others = [s for s in tiff.series[1:] if s.keyframe not in masks and math.prod(s.shape) >= math.prod(series.shape)]
    if others:
        raise OSError(f"holds {1 + len(others)} images: save each in a file of its own")
    sizes = {a: size for a, size in zip(series.axes, series.shape, strict=True) if size > 1 or a in "YX"}
    letters = "".join(sizes)
    if not {"Y", "X"} <= sizes.keys():
        raise OSError(f"has axes {series.axes}, which are no image's")
    reading.check_size(sizes["X"], sizes["Y"])
    name = series.dtype.name
    if name not in KNOWN:
        raise OSError(f"has {name} values: save it as one of {', '.join(DTYPES)}")
    if series.keyframe.photometric == PALETTE:
        raise OSError("has pages of palette colours: save them in grey or RGB")
    page, stored = series.keyframe, np.dtype(tiff.byteorder + series.keyframe.dtype.char)
    outer = {letter: size for letter, size in sizes.items() if letter not in "YXS"}
    if series.dataoffset is not None and isinstance(file, io.BufferedReader):  # the values lie in a file as they are
        values = np.memmap(file, stored, "r", series.dataoffset, tuple(sizes.values()))
        stack = AxesStack(values, letters)
    elif math.prod(outer.values()) == len(series.pages) and TiffPage.can_read(page):
        stack = AxesStack(TiffPages(series.pages, outer), "".join(outer) + "YXS")
    else:
        stack = AxesStack(series.asarray().reshape(list(sizes.values())), letters)
    missing = _missing(tiff.pages[0])
    if page.photometric == WHITE_IS_LEAST and stack.dtype.kind == "u":
        stack = Reversed(stack, (1 << page.bitspersample) - 1)
        missing = None if missing is None else stack.greatest - missing
        reading = replace(reading, nodata=None if reading.nodata is None else stack.greatest - reading.nodata)
    valid = next((TiffPage(mask) for mask in masks if mask.shape == (sizes["Y"], sizes["X"])), None)
    image = open_stack(stack, reading, f"pages (axes {letters})", missing, valid)
    orientation = tiff.pages[0].tags.get(ORIENTATION)
    if turn := TURNS.get(orientation.value if orientation else 1):
        width, height = image.size
        if valid is not None:
            valid = turn(valid[0:height, 0:width])
        turned = ArrayImage(turn(image.values[0:height, 0:width]), reading, missing, valid)
        turned.pages = image.pages
        return turned
    return image


def _missing(page: Any) -> float | None:
    """The value that a page's tag says to stand for missing ones."""
    tag = page.tags.get(NODATA)
    try:
        return None if tag is None else float(str(tag.value).strip("\0 "))
    except ValueError:  # an empty one, say
        return None


class Reversed:
    """A stack whose least values are white, with light as high as everywhere else. greatest: of its values."""

    def __init__(self, stack: Stack, greatest: int) -> None:
        self.stack, self.greatest, self.shape, self.dtype = stack, greatest, stack.shape, stack.dtype

    def __getitem__(self, place: tuple[slice, slice, slice]) -> np.ndarray:
        return self.dtype.type(self.greatest) - self.stack[place]


class TiffPages:
    """The pages of a series as an array [..., H, W, C]. outer: the letters and lengths of its first axes."""

    def __init__(self, pages: Sequence[Any], outer: dict[str, int]) -> None:
        if any(page is None for page in pages):
            raise OSError("lacks some of the pages that it names")
        self.pages = [TiffPage(page) for page in pages]
        self.lengths, self.dtype = tuple(outer.values()), self.pages[0].dtype
        self.shape = *self.lengths, *self.pages[0].shape

    def __getitem__(self, place: tuple[int | slice, ...]) -> np.ndarray:
        numbers = np.arange(len(self.pages)).reshape(self.lengths)[place[:-3]]
        found = [self.pages[number][place[-3:-1]] for number in numbers.flat]
        return np.stack(found).reshape(*numbers.shape, *found[0].shape)


class TiffPage:
    """A page of an open file as an array [H, W, C]. A slice decodes only the tiles or strips that it needs."""

    def __init__(self, frame: Any) -> None:
        self.frame, self.page = frame, frame.keyframe  # whose layout all frames of a series share
        page, self.dtype = self.page, self.page.dtype
        self.planes, _, height, width, self.interleaved = page.shaped
        self.shape = height, width, self.planes * self.interleaved
        self.side = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)

    @staticmethod
    def can_read(page: Any) -> bool:
        """Whether a page lies in tiles or strips of one depth, as nearly all do."""
        return page.imagedepth == 1 and bool(page.is_tiled or page.rowsperstrip)

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        (top, bottom), (left, right) = ((s.start, s.stop) for s in place)
        (tall, wide), (height, width, _) = self.side, self.shape
        down, across = -(-height // tall), -(-width // wide)
        found = np.zeros((self.planes, bottom - top, right - left, self.interleaved), self.dtype)
        for plane in range(self.planes):
            for row in range(top // tall, -(-bottom // tall)):
                for column in range(left // wide, -(-right // wide)):
                    tile = self._tile((plane * down + row) * across + column)
                    y, x = row * tall, column * wide
                    up, to_left = max(top, y), max(left, x)
                    part = tile[up - y : bottom - y, to_left - x : right - x]
                    rows, columns, _ = part.shape
                    found[plane, up - top : up - top + rows, to_left - left : to_left - left + columns] = part
        return np.moveaxis(found, 0, -2).reshape(*found.shape[1:3], -1)

    def _tile(self, number: int) -> np.ndarray:
        """A tile or strip [rows, columns, C], without what reaches beyond the image; one that is left out is empty."""
        page, frame, handle = self.page, self.frame, self.frame.parent.filehandle
        handle.seek(frame.dataoffsets[number])
        data = handle.read(frame.databytecounts[number]) or None
        try:
            values, _, (_, rows, columns, _) = page.decode(data, number, jpegtables=frame.jpegtables)
        except Exception as error:  # each codec has exceptions of its own
            if "imagecodecs" in str(error):
                library("imagecodecs", "microscopy")
            raise OSError(f"a damaged TIFF: {error}") from None
        if values is None:
            return np.full((rows, columns, self.interleaved), page.nodata, self.dtype)
        return values[0, :rows, :columns]
