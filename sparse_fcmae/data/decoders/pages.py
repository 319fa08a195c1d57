"""Files of several pages: z-stacks, time series, volumes, stacks of images; and a page as an image of its own."""

import math
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import numpy as np

from sparse_fcmae.data.decoders.image import ROUNDED, ArrayImage, PagesUnsaid, Reading

CHANNELS = "CS"  # letters of the axes that count channels and samples; all but these, X and Y count pages


class Stack(Protocol):
    """Pages [pages, H, W, C], of which a slice of pages, rows and columns is read when it is asked for."""

    shape: tuple[int, int, int, int]
    dtype: np.dtype

    def __getitem__(self, place: tuple[slice, slice, slice]) -> np.ndarray: ...


class Page:
    """A page of a file that is an image of its own. number: counted from 0. The file is closed with it."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self.file, self.number = file, number

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *raised: object) -> None:
        self.file.__exit__(*raised)


class AxesStack:
    """An array, or what is sliced as one, whose axes have letters in tifffile's manner, as a stack."""

    def __init__(self, values: Any, letters: str) -> None:
        self.values, self.letters, self.dtype = values, letters, np.dtype(values.dtype)
        sizes = dict(zip(letters, values.shape, strict=True))
        self.inner = [letter for letter in letters if letter in ("Y", "X", *CHANNELS)]
        self.channels = [letter for letter in self.inner if letter in CHANNELS]
        self.outer = {letter: sizes[letter] for letter in letters if letter not in self.inner}
        channels = math.prod(sizes[letter] for letter in self.channels)
        self.shape = math.prod(self.outer.values()), sizes["Y"], sizes["X"], channels

    def __getitem__(self, place: tuple[slice, slice, slice]) -> np.ndarray:
        pages, rows, columns = place
        return np.stack([self._page(number, rows, columns) for number in range(self.shape[0])[pages]])

    def _page(self, number: int, rows: slice, columns: slice) -> np.ndarray:
        place = dict(zip(self.outer, np.unravel_index(number, tuple(self.outer.values())), strict=True))
        place |= {"Y": rows, "X": columns}
        values = np.asarray(self.values[tuple(place.get(letter, slice(None)) for letter in self.letters)])
        values = values.transpose([self.inner.index(letter) for letter in ("Y", "X", *self.channels)])
        return values.reshape(*values.shape[:2], -1)


class OfPages:
    """Pages of a stack together as one image [H, W, C]. make: the image of pages [pages, h, w, C]."""

    def __init__(self, stack: Stack, pages: slice, make: Callable[[np.ndarray], np.ndarray], in_chans: int) -> None:
        self.stack, self.pages, self.make, self.dtype = stack, pages, make, stack.dtype
        self.shape = *stack.shape[1:3], in_chans

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        return self.make(np.asarray(self.stack[(self.pages, *place)]))


def open_stack(
    stack: Stack, reading: Reading, what: str = "pages", missing: float | None = None, valid: Any = None
) -> ArrayImage:
    """The image that a reading makes of a file's pages.

    what: they are called. missing, valid: as in `ArrayImage`. Raises OSError for several pages where the reading says
    nothing of them, and for a page that is not there.
    """
    count, _, _, channels = stack.shape
    if count > 1 and reading.pages is None:
        raise PagesUnsaid(f"has {count} {what}: --pages says what they are, channels, max or images")
    number = reading.page or 0
    if number >= count:
        raise OSError(f"has {count} {what}, and page {number + 1} is to be read: has the file changed?")
    if count > 1 and reading.pages == "images" and reading.page is None:
        raise OSError(f"has {count} {what}, each an image: say which is meant, counted from 0, as page=0")
    if reading.pages == "channels":
        values = OfPages(stack, slice(None), _side_by_side, count * channels)
    elif reading.pages == "max":
        known = missing if reading.nodata is None else reading.nodata
        values = OfPages(stack, slice(None), lambda pages: greatest(pages, known), channels)
    else:
        values = OfPages(stack, slice(number, number + 1), lambda pages: pages[0], channels)
    image = ArrayImage(values, reading, missing, valid)
    image.pages = count
    return image


def greatest(pages: np.ndarray, missing: float | None) -> np.ndarray:
    """The greatest value of pages [pages, ...] that is not missing: [...].

    Those that are not finite, and where there is one of them the value `missing`, are missing. Where all are, so is the
    result.
    """
    absent = pages == missing if missing is not None else np.zeros(pages.shape, bool)
    with np.errstate(over="ignore"):  # what is beyond float32 is missing
        pages = pages.astype(ROUNDED.get(pages.dtype.name, pages.dtype))
    if pages.dtype.kind == "f":
        absent |= ~np.isfinite(pages)
        least = -np.inf
    else:
        least = np.iinfo(pages.dtype).min
    found = np.where(absent, pages.dtype.type(least), pages).max(0)
    return np.where(absent.all(0), pages[0], found)


def _side_by_side(pages: np.ndarray) -> np.ndarray:
    """Pages [pages, h, w, C] as [h, w, pages * C]."""
    return np.moveaxis(pages, 0, -2).reshape(*pages.shape[1:3], -1)
