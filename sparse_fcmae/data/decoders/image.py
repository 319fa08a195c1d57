"""What every decoder gives: an open image, of which boxes are read in the size that a view asks for."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.data.config import MAX_MEGAPIXELS
from sparse_fcmae.data.format import FLOATS, ImageFormat

EXTRAS = {  # and their packages
    "datasets": ("datasets",),
    "medical": ("pydicom",),
    "microscopy": ("tifffile", "imagecodecs", "zarr"),
    "remote": ("aiohttp", "fsspec", "gcsfs", "huggingface_hub", "s3fs"),
}
BAND = 1024  # rows that are decoded at once where all are
LEAST_KNOWN = 0.5  # of a resampled value's weights that are on values: with fewer it is missing
ROUNDED = {"float64": "float32"}  # dtypes that are read as another one
TURNS: dict[
    int, Callable[[np.ndarray], np.ndarray]
] = {  # by the value of the orientation's tag, what makes [H, W, C] upright
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Reading:
    """As what every image of a data set is read. An image that is something else counts as unreadable.

    in_chans: channels. dtype: of the values, one of `format.DTYPES`. channels: which of a file's channels these are,
    counted from 1, None for all. pages: what becomes of a file's pages: "channels", "max" for the greatest value of
    each pixel, "images" of which the one to read is `page`, counted from 0, None where files have one page. nodata: the
    value of missing pixels, which are read as NaN. max_megapixels: of an image.
    """

    in_chans: int = 3
    dtype: str = "uint8"
    channels: tuple[int, ...] | None = None
    pages: str | None = None
    page: int | None = None
    nodata: float | None = None
    max_megapixels: float = MAX_MEGAPIXELS

    def check_size(self, width: int, height: int) -> None:
        """Raises OSError for an image that is too large."""
        if (megapixels := width * height / 1e6) > self.max_megapixels:
            limit = f"{self.max_megapixels:.4g} of --max-megapixels"
            raise OSError(f"it has {megapixels:.4g} megapixels, more than the {limit}")

    def selected(self, values: np.ndarray) -> np.ndarray:
        """The channels of [H, W, C] that are read. Raises OSError where there are fewer, or others than expected."""
        if self.channels:
            if max(self.channels) > values.shape[-1]:
                raise OSError(f"has {counted(values.shape[-1])}, and channel {max(self.channels)} is to be read")
            values = values[..., [number - 1 for number in self.channels]]
        if values.shape[-1] != self.in_chans:
            raise OSError(f"has {counted(values.shape[-1])}, not {self.in_chans}")
        return values


def counted(channels: int) -> str:
    """A number of channels in words."""
    return f"{channels} channel{'s' if channels != 1 else ''}"


PHOTOGRAPHS = Reading()


class MissingLibrary(OSError):
    """A file that can't be read without a library that is not installed."""


def library(name: str, extra: str) -> Any:
    """A library of an extra of this package. Raises MissingLibrary, with the extra's packages, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        packages = " ".join(EXTRAS[extra])
        raise MissingLibrary(f"needs {name}: pip install {packages} (the extra {extra})") from None


class PagesUnsaid(OSError):
    """A file of several pages, of which nothing says what they are."""


class OpenImage(ABC):
    """An image whose pixels are not read yet.

    size: (width, height) in pixels, upright. dtype: of its values, one of `format.DTYPES`. in_chans: its channels; a
    photograph in colour has 3, whatever its file stores. is_photograph: whether colour becomes grey, and grey colour,
    where that is asked for. pages: of its file. hint: what the user should know of how it is read, if anything.
    """

    size: tuple[int, int]
    dtype: str
    in_chans: int
    is_photograph: bool = False
    pages: int = 1
    hint: str | None = None

    @abstractmethod
    def resized_crop(self, box: Box, size: tuple[int, int]) -> Tensor:
        """A box of it in a size (height, width): [height, width, channels] of the dtype asked for.

        Raises OSError where the image is not what the data set's other images are.
        """

    @abstractmethod
    def decode_all(self) -> None:
        """Decodes all of it, for nothing but to raise what a damaged image raises."""


class ArrayImage(OpenImage):
    """An image of values that are kept as they are.

    values: [H, W, C], an array or anything else that is sliced as one. missing: the file's own value for missing ones.
    valid: where there are values, [H, W, 1], None for everywhere.
    """

    def __init__(self, values: Any, reading: Reading, missing: float | None = None, valid: Any = None) -> None:
        height, width, self.in_chans = values.shape
        self.size, self.values, self.reading = (width, height), values, reading
        reading.check_size(width, height)
        stored = ROUNDED.get(values.dtype.name, values.dtype.name)
        self.missing = missing if reading.nodata is None and _can_be(missing, values.dtype) else reading.nodata
        self.valid, whole = valid, self.missing is None and valid is None
        self.dtype = stored if whole or stored in FLOATS else "float32"

    def resized_crop(self, box: Box, size: tuple[int, int]) -> Tensor:
        if self.dtype != self.reading.dtype:
            raise OSError(f"has {self.dtype} values, not {self.reading.dtype}")
        left, top, right, bottom = box
        crop = self.reading.selected(np.asarray(self.values[top:bottom, left:right]))
        crop = np.array(crop, dtype=crop.dtype.newbyteorder("="), order="C")
        if self.reading.dtype in FLOATS:
            absent = np.zeros(crop.shape, bool)
            if self.valid is not None:
                absent |= ~np.asarray(self.valid[top:bottom, left:right]).astype(bool)
            if self.missing is not None and _can_be(self.missing, crop.dtype):
                absent |= crop == np.asarray(self.missing).astype(crop.dtype)
            with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is missing then
                crop = crop.astype(self.reading.dtype)
            crop[absent | ~np.isfinite(crop)] = np.nan
        return resampled(crop, size)

    def decode_all(self) -> None:
        width, height = self.size
        for top in range(0, height, BAND):
            np.asarray(self.values[top : min(height, top + BAND), 0:width])


def _can_be(value: float | None, dtype: np.dtype) -> bool:
    """Whether a value can occur among those of a dtype."""
    if value is None or dtype.kind == "f":
        return value is not None
    return float(value).is_integer() and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max


def resampled(crop: np.ndarray, size: tuple[int, int]) -> Tensor:
    """[h, w, C] in another size (height, width), of the same dtype; itself where it has that size.

    Bicubic with antialiasing, in float32, of int32 in float64. A value that is mostly made of missing ones, NaN, is
    missing; of what is there the weights add up to one.
    """
    values = torch.from_numpy(crop)
    if crop.shape[:2] == tuple(size):
        return values
    exact = values.to(torch.float64 if crop.dtype == np.int32 else torch.float32).movedim(-1, 0)[None]

    def resize(images: Tensor) -> Tensor:
        return F.interpolate(images, size, mode="bicubic", antialias=True)

    known = exact.isfinite()
    if known.all():
        result = resize(exact)
        if values.dtype not in (torch.float16, torch.float32):
            limits = np.iinfo(crop.dtype)
            result = result.round_().clamp_(limits.min, limits.max)  # bicubic weights reach beyond the values
    else:
        share = resize(known.to(exact.dtype))
        result = torch.where(share > LEAST_KNOWN, resize(exact.nan_to_num(0.0)) / share, torch.nan)
    if crop.dtype == np.float16:
        result = result.clamp(*(float(limit) for limit in (np.finfo(np.float16).min, np.finfo(np.float16).max)))
    return result[0].movedim(0, -1).to(values.dtype).contiguous()


def reading_of(form: ImageFormat, **options: Any) -> Reading:
    """How images are read that a model takes in this format. options: further fields of the reading."""
    kept = {"pages": form.pages, "nodata": form.nodata}
    return Reading(
        form.in_chans, form.dtype, form.channels, **kept | {k: v for k, v in options.items() if v is not None}
    )
