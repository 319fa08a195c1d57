"""How the images of a data set are stored and normalised: one rule for all of them, never one a file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

BYTE = 255  # the greatest value of a uint8
FLOATS = ("float16", "float32")
DTYPES = ("uint8", "uint16", "int16", "int32", *FLOATS)  # in which values travel to the device
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of values from 0 to 255


@dataclass(frozen=True)
class ImageFormat:
    """What a model takes.

    dtype: of the values, one of DTYPES. mean, std: what each channel is normalised with, in the values' own units.
    channels: which of a file's channels are read, counted from 1, None for all. native: whether images keep their own
    resolution, of which the model sees windows. pages, nodata: as in `decoders.image.Reading`.
    """

    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: tuple[int, ...] | None = field(default=None, kw_only=True)
    native: bool = field(default=False, kw_only=True)
    pages: str | None = field(default=None, kw_only=True)
    nodata: float | None = field(default=None, kw_only=True)

    @classmethod
    def imagenet(cls, in_chans: int = 3) -> "ImageFormat":
        """8 bits and ImageNet's statistics, for any number of channels but 3 the means of these over its channels."""
        if in_chans == 3:
            return cls("uint8", IMAGENET_MEAN, IMAGENET_STD)
        mean, std = (sum(values) / 3 for values in (IMAGENET_MEAN, IMAGENET_STD))
        return cls("uint8", (mean,) * in_chans, (std,) * in_chans)

    @classmethod
    def of_json(cls, entries: Mapping[str, Any]) -> "ImageFormat":
        """What `as_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        mean, std = (tuple(map(float, entries[name])) for name in ("mean", "std"))
        if entries["dtype"] not in DTYPES:
            raise ValueError(f"no image format: {dict(entries)}")
        _check_statistics(mean, std)
        channels = entries.get("channels")
        channels, native = tuple(map(int, channels)) if channels else None, bool(entries.get("native"))
        more = {"pages": entries.get("pages"), "nodata": entries.get("nodata")}
        return cls(entries["dtype"], mean, std, channels=channels, native=native, **more)

    def as_json(self) -> dict[str, Any]:
        """The fields, for a JSON file; without `channels` where all are read, and `native` where it is not so."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    @property
    def is_usual(self) -> bool:
        """Whether other libraries' configs can say it all: 8 bits, all channels, resized."""
        return self.dtype == "uint8" and not (self.channels or self.native or self.pages)

    @property
    def in_chans(self) -> int:
        """The number of channels."""
        return len(self.mean)

    @property
    def is_photograph(self) -> bool:
        """Whether images can be shown, and augmented, as 8-bit colour or greyscale."""
        return self.dtype == "uint8" and self.in_chans in (1, 3)

    @property
    def unit(self) -> float:
        """By what other libraries divide values before they normalise them: 255 for uint8, else 1."""
        return BYTE if self.dtype == "uint8" else 1

    @property
    def in_units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of values that have been divided by `unit`."""
        mean, std = (tuple(round(value / self.unit, 9) for value in values) for values in (self.mean, self.std))
        return mean, std

    def normalise(self, pixels: Tensor) -> Tensor:
        """[B, H, W, C] of `dtype` -> float32 [B, C, H, W], normalised, on the same device.

        A missing value, NaN, becomes 0, its channel's mean. int32 is computed in float64, as float32 can't hold it.
        """
        mean, std = _rows(self, pixels.device, pixels.shape[-2])
        rows = pixels.flatten(2).to(mean.dtype)  # in whole rows, as CPUs are slow at broadcasting along three channels
        if rows.data_ptr() == pixels.data_ptr():  # float32 already
            rows = rows.clone()
        rows = rows.sub_(mean).div_(std).float()
        if self.dtype in FLOATS:
            rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)

    def statistics(self, device: torch.device) -> Tensor:
        """What models normalise pixels of this format by, as `normalise` does: float64 [2, C], mean and deviation."""
        return _statistics(self, device)

    def restore(self, images: Tensor) -> Tensor:
        """The inverse of `normalise`, but for the dtype: float32 [B, C, H, W] -> float32 [B, C, H, W]."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return images * std + mean


def of_units(mean: Sequence[float], std: Sequence[float]) -> ImageFormat:
    """The format of 8-bit images that are divided by 255 and then normalised with these, as other libraries do."""
    means, deviations = (tuple(round(BYTE * float(value), 9) for value in values) for values in (mean, std))
    _check_statistics(means, deviations)
    return ImageFormat("uint8", means, deviations)


def _check_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raises ValueError for what no channel can be normalised by."""
    if not len(mean) == len(std) > 0:
        raise ValueError(f"{len(mean)} means for {len(std)} deviations")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean {list(mean)} and deviation {list(std)} must be finite, the latter above 0")


@cache
def _statistics(form: ImageFormat, device: torch.device) -> Tensor:
    """Mean and deviation, float64 [2, C]. Made once, as making them waits for a GPU.

    But for int32 they are products of float32 numbers, as they always were: so runs go on to the same numbers.
    """
    if form.dtype == "int32":
        return torch.tensor((form.mean, form.std), dtype=torch.float64, device=device)
    of_unit = [[value / form.unit for value in values] for values in (form.mean, form.std)]
    return (form.unit * torch.tensor(of_unit, dtype=torch.float32)).to(device, torch.float64)


@cache
def _rows(form: ImageFormat, device: torch.device, width: int) -> Tensor:
    """Mean and deviation of a row of pixels, [2, width * channels], float64 for int32 and else float32."""
    dtype = torch.float64 if form.dtype == "int32" else torch.float32
    return form.statistics(device).repeat(1, width).to(dtype)
