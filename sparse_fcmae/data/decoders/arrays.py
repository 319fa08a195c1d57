"""NumPy's files: .npy, which is mapped, not read, and .npz. An array is an image, or a stack of them."""

import io
from collections.abc import Sequence
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from sparse_fcmae.data.decoders.image import OpenImage, Reading
from sparse_fcmae.data.decoders.pages import AxesStack, open_stack
from sparse_fcmae.data.format import DTYPES

MAGIC, ZIP = b"\x93NUMPY", b"PK\x03\x04"
KNOWN = {*DTYPES, "float64"}
COLOURS = 4  # a last axis that is no longer than that counts channels, even where pages are expected


class InMemory:
    """An image in the place of a file: one of Pillow's, or an array. Raises TypeError for anything else."""

    def __init__(self, image: Image.Image | np.ndarray) -> None:
        if not isinstance(image, Image.Image | np.ndarray):
            raise TypeError(f"is a {type(image).__name__}, and not an image of Pillow's, an array, a tensor or a path")
        self.image = image

    def __enter__(self) -> "InMemory":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def recognises(head: bytes) -> bool:
    """Whether a file that begins so holds arrays."""
    return head.startswith((MAGIC, ZIP))


def open_image(file: BinaryIO, reading: Reading) -> OpenImage:
    """The array in a file. Raises OSError for one that is no image, and where there are several."""
    try:
        if isinstance(file, io.BytesIO) or file.read(len(ZIP)) == ZIP:
            file.seek(0)
            values = np.load(file, allow_pickle=False)
        else:
            file.seek(0)
            np.lib.format.read_magic(file)
            file.seek(0)
            values = np.load(file.name, mmap_mode="r", allow_pickle=False)
        if not isinstance(values, np.ndarray):
            if len(values.files) != 1:
                raise OSError(f"holds the arrays {', '.join(values.files)}: save the one of images as .npy")
            values = values[values.files[0]]
    except (ValueError, KeyError, BadZipFile) as error:
        raise OSError(f"no array that can be read: {error}") from None
    return of_array(values, reading)


def of_array(values: Any, reading: Reading, letters: str | None = None) -> OpenImage:
    """The image in an array, or in what is sliced as one. letters: of its axes, where they are known."""
    name = np.dtype(values.dtype).name
    if name not in KNOWN:
        raise OSError(f"has {name} values: save it as one of {', '.join(DTYPES)}")
    found = letters or axes_of(values.shape, reading.pages in ("images", "max"))
    stack = AxesStack(values, found)
    reading.check_size(stack.shape[2], stack.shape[1])
    image = open_stack(stack, reading)
    if not letters and found == "CYX" and reading.pages is None and values.shape[0] > COLOURS:
        image.hint = f"the first of axes {list(values.shape)} counts channels: if it counts images, give `pages=images`"
    return image


def axes_of(shape: Sequence[int], of_pages: bool) -> str:
    """The letters of an array's axes: Y and X, C for channels, and P for pages.

    Of three axes the shortest counts channels, and of four the shortest of the last three; the first of four counts
    pages. of_pages: the first of three axes counts pages too, unless the last is one of at most COLOURS channels.
    Raises OSError where that does not say it.
    """
    axes = f"{len(shape)} axes {list(shape)}"
    if len(shape) == 2:
        return "YX"
    if len(shape) == 3 and of_pages and shape[-1] > COLOURS:
        return "PYX"
    if len(shape) not in (3, 4):
        raise OSError(f"has {axes}: an image has two, three with its channels, and four with its pages too")
    last = list(shape[-3:])
    if last.count(min(last)) > 1:
        raise OSError(f"has {axes}, of which none is the shortest, to count channels: is it a stack (--pages images)?")
    return "P" * (len(shape) - 3) + ("CYX", "YCX", "YXC")[last.index(min(last))]
