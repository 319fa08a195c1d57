"""What a model sees of an image: a crop of it in the model's size, random in training and centred in evaluation.

A view is called with an image's file and returns its pixels, [height, width, channels] of the dtype that is read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_fcmae.data.config import NATIVE_SCALE, RATIOS
from sparse_fcmae.data.decoders import File, open_image
from sparse_fcmae.data.decoders.image import PHOTOGRAPHS, Box, Reading
from sparse_fcmae.data.decoders.photograph import to_tensor

TRIES = 10  # windows that are drawn in search of one that shows enough
Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class View:
    """What all views have. size: (height, width) in pixels. reading: as what images are read."""

    size: tuple[int, int]
    reading: Reading = PHOTOGRAPHS

    @property
    def nbytes(self) -> int:
        """Bytes of what a call returns."""
        return math.prod(self.size) * self.reading.in_chans * np.dtype(self.reading.dtype).itemsize


class Crop(NamedTuple):
    """A part of an image: its box, the size (height, width) that it is brought to, and how it is turned then."""

    box: Box
    size: tuple[int, int]
    flipped: bool
    quarter_turns: int

    def turned(self, pixels: np.ndarray) -> Tensor:
        """Pixels [height, width, ...] flipped horizontally where that is so, and turned."""
        pixels = pixels[:, ::-1] if self.flipped else pixels  # as torch can't turn all dtypes
        return torch.from_numpy(np.ascontiguousarray(np.rot90(pixels, self.quarter_turns)))


@dataclass(frozen=True)
class RandomView(View):
    """A random resized crop, flipped horizontally in half of the cases, and augmented where `augment` is given.

    min_area: the least fraction of the image's area that a crop shows. augment: of photographs. ratios: the least and
    the greatest width of a crop by its height. hflip: whether crops are flipped. rotate: each of the eight ways to turn
    and flip a crop is as likely, whatever hflip is. All is drawn from the generator that the view is called with.
    """

    min_area: float = 0.2
    augment: Augment | None = None
    ratios: tuple[float, float] = RATIOS
    hflip: bool = True
    rotate: bool = False

    def __call__(self, file: File, rng: np.random.Generator) -> Tensor:
        return self.with_crop(file, rng)[0]

    def with_crop(self, file: File, rng: np.random.Generator) -> tuple[Tensor, Crop]:
        """The pixels, and which part of the image they are."""
        image = open_image(file, self.reading)
        quarter_turns = int(rng.integers(4)) if self.rotate else 0
        size, ratios = self.size, self.ratios
        if quarter_turns % 2:
            size, ratios = size[::-1], (1 / ratios[1], 1 / ratios[0])
        box = random_crop_box(*image.size, rng, (self.min_area, 1.0), ratios)
        crop = Crop(box, size, rng.random() < 0.5 and (self.hflip or self.rotate), quarter_turns)
        return turned(image.resized_crop(box, size), self.augment, rng, crop), crop


@dataclass(frozen=True)
class NativeView(View):
    """A random window at the image's own resolution, or around it.

    scale: the least and the greatest side of a window by the size, of which the logarithm is uniform; at 1 pixels are
    not resampled. min_valid, min_std: a window with a smaller fraction of values, or a smaller deviation by that of the
    data set, `std`, is drawn again, TRIES times at most. augment, hflip and rotate: as in `RandomView`. All is drawn
    from the generator that the view is called with.
    """

    scale: tuple[float, float] = NATIVE_SCALE
    min_valid: float = 0.0
    min_std: float = 0.0
    std: tuple[float, ...] = ()
    augment: Augment | None = None
    hflip: bool = True
    rotate: bool = False

    def check(self, width: int, height: int) -> None:
        """Raises OSError for an image that is smaller than the least window, be it turned or not."""
        for tall, wide in (self.size, self.size[::-1]) if self.rotate else (self.size,):
            check_window(width, height, round(self.scale[0] * tall), round(self.scale[0] * wide))

    def __call__(self, file: File, rng: np.random.Generator) -> Tensor:
        return self.with_crop(file, rng)[0]

    def with_crop(self, file: File, rng: np.random.Generator) -> tuple[Tensor, Crop]:
        """The pixels, and which part of the image they are."""
        image = open_image(file, self.reading)
        self.check(*image.size)
        quarter_turns = int(rng.integers(4)) if self.rotate else 0
        size = self.size[::-1] if quarter_turns % 2 else self.size
        flipped = rng.random() < 0.5 and (self.hflip or self.rotate)
        for _ in range(TRIES):
            crop = Crop(random_window(*image.size, size, rng, self.scale), size, flipped, quarter_turns)
            pixels = image.resized_crop(crop.box, size)
            if self._shows_enough(pixels):
                break
        return turned(pixels, self.augment, rng, crop), crop

    def _shows_enough(self, pixels: Tensor) -> bool:
        if not (self.min_valid or self.min_std):
            return True
        values = pixels.flatten(0, 1).double()
        there = values.isfinite()
        if not there.any() or there.double().mean() < self.min_valid:
            return False
        mean = values.nan_to_num(0).sum(0) / there.sum(0).clamp_min(1)
        variance = ((values - mean).square().nan_to_num(0)).sum(0) / there.sum(0).clamp_min(1)
        return bool((variance.sqrt() / torch.tensor(self.std)).mean() >= self.min_std)


@dataclass(frozen=True)
class CentreView(View):
    """A centred crop.

    crop_fraction: the sides of the crop relative to the largest one that the image has of this shape. native: the crop
    has the view's size instead, in the image's own resolution.
    """

    crop_fraction: float = 1.0
    native: bool = False

    def __call__(self, file: File) -> Tensor:
        image, (height, width) = open_image(file, self.reading), self.size
        if self.native:
            check_window(*image.size, height, width)
            left, top = (image.size[0] - width) // 2, (image.size[1] - height) // 2
            return image.resized_crop((left, top, left + width, top + height), self.size)
        return image.resized_crop(centre_crop_box(*image.size, width / height, self.crop_fraction), self.size)


def default_crop_fraction(size: tuple[int, int]) -> float:
    """The crop fraction for evaluation in a size: the paper's 0.875, and 1 for small images and for large ones."""
    return 0.875 if 64 < min(size) < 384 else 1.0


def random_crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratios: tuple[float, float] = RATIOS,
) -> Box:
    """The box of a random resized crop of an image.

    Its fraction of the area is uniform in `scale`, and its width by its height log-uniform in `ratios`. After ten boxes
    that do not fit into the image, it is the largest centred one of such a ratio.
    """
    area, (low, high) = width * height, ratios
    for _ in range(10):
        target = area * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = max(1, min(width, round(height * high))), max(1, min(height, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def turned(pixels: Tensor, augment: Augment | None, rng: np.random.Generator, crop: Crop) -> Tensor:
    """A crop's pixels augmented and turned."""
    if augment:
        pixels = to_tensor(augment(Image.fromarray(pixels.squeeze(-1).numpy()), rng))
    return crop.turned(pixels.numpy())


def random_window(
    width: int, height: int, size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float]
) -> Box:
    """The box of a window, within an image, whose sides are those of `size` (height, width) times a random scale."""
    low, high = scale
    largest = min(high, width / size[1], height / size[0])
    factor = math.exp(rng.uniform(math.log(low), math.log(max(low, largest)))) if high > low else low
    w, h = min(width, round(factor * size[1])), min(height, round(factor * size[0]))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def check_window(width: int, height: int, window_height: int, window_width: int) -> None:
    """Raises OSError for an image that is smaller than a window."""
    if width < window_width or height < window_height:
        least = f"{window_height}x{window_width}"
        raise OSError(f"has {height}x{width} pixels, fewer than a native window of {least}: lower --image-size")


def centre_crop_box(width: int, height: int, aspect: float, crop_fraction: float = 1.0) -> Box:
    """The largest centred box of an image with width / height = `aspect`, its sides times `crop_fraction`."""
    w, h = round(crop_fraction * min(width, height * aspect)), round(crop_fraction * min(height, width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(w, 1), top + max(h, 1)
