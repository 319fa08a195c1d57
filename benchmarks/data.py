"""Images a second on one core, from files to normalised batches: this package's random crops against torchvision's.

Every candidate decodes the same files with Pillow, in this process and taking turns, and ends in normalised float32
batches. torchvision's transforms are in the recipe of MAE and FCMAE: v1 on Pillow images, as published, v2 on tensors.
Ours is refused where its pixels are not those of torchvision (of Pillow, without it) in the same boxes.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.benchmarks.timing import take_turns
from sparse_fcmae.config import DataConfig, image_size_of
from sparse_fcmae.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFolder,
    load_crop,
    normalise,
    random_crop_box,
    to_eight_bits,
)
from sparse_fcmae.errors import UserError
from sparse_fcmae.formats.libraries import entry

OURS = "sparse-fcmae"
BATCH = 32  # images that are stacked and normalised at once
COMPARED = 32  # images whose pixels are compared
TOLERANCE = 1.5  # mean absolute difference of the pixels, of 255
COLUMNS: Columns = {
    "candidate": ("candidate", ""),
    "images": ("images", "d"),
    "unreadable": ("unreadable", "d"),
    "ms": ("ms an image", ".2f"),
    "images_per_second": ("images/s", ".0f"),
    "ours_over_it": ("ours over it", ".2f"),
    "difference": ("mean difference", ".2f"),
    "max_difference": ("max difference", "d"),
}


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def data(**options: Any) -> list[Row]:
    """Prints and returns a row a candidate; options are those of `DataConfig`.

    difference, max_difference: of pixels, of 255. unreadable: files that were left out. Raises UserError for wrong
    options and where no image can be read.
    """
    config = DataConfig(**options)
    results = Results("data", config, COLUMNS, torch.device("cpu"))
    size = image_size_of(config.image_size)
    if min(size) < 1:
        raise UserError(f"--image-size {config.image_size} must be greater than 0")
    if not config.data:
        raise UserError("--data is missing: name the folder with the images")
    folder = ImageFolder(config.data)
    looked_at = range(min(config.images, len(folder)))
    indices = [i for i in looked_at if readable(folder, i)]
    if not indices:
        raise UserError(f"--data {config.data}: none of the first {len(looked_at)} images can be read")

    rows: dict[str, Row] = {OURS: {}}
    runs: dict[str, Callable[[], None]] = {}
    mean, greatest = differences(folder, indices[:COMPARED], size, config.seed)
    rows[OURS] = {"difference": mean, "max_difference": greatest}
    if mean < TOLERANCE:
        runs[OURS] = ours(folder, indices, size, config.seed)
    else:
        rows[OURS]["refused"] = f"its pixels differ by {mean:.1f} of 255"
    for name, make in CANDIDATES.items():
        rows[name] = {}
        try:
            runs[name] = theirs(folder, indices, make(size), config.seed)
        except UserError as error:
            rows[name]["refused"] = str(error)
    times = take_turns(runs, config.rounds, torch.device("cpu"))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows[name] |= {"ms": 1e3 * median / len(indices), "images_per_second": len(indices) / median}
        if OURS in times:
            rows[name]["ours_over_it"] = statistics.median(t / o for o, t in zip(times[OURS], seconds, strict=True))
    counts = {"images": len(indices), "unreadable": len(looked_at) - len(indices) or None}
    result = [{"candidate": name, **counts, **row} for name, row in rows.items()]
    results.add(result)
    return results.finish()


def readable(folder: ImageFolder, index: int) -> bool:
    try:
        with folder.open(index) as image:
            image.load()
    except Exception:  # Pillow's decoders raise nearly anything on a broken file
        return False
    return True


def random_numbers(seed: int, index: int) -> np.random.Generator:
    """Those of an image's crop."""
    return np.random.default_rng((seed, index))


def ours(folder: ImageFolder, indices: list[int], size: tuple[int, int], seed: int) -> Callable[[], None]:
    """A round of this package's crops."""

    def crop(index: int) -> np.ndarray:
        with folder.open(index) as image:
            return load_crop(image, size, 3, random_numbers(seed, index))

    def run() -> None:
        for batch in batches(indices):
            normalise(torch.from_numpy(np.stack([crop(i) for i in batch])))

    return run


def theirs(
    folder: ImageFolder, indices: list[int], transform: Callable[[Image.Image], Tensor], seed: int
) -> Callable[[], None]:
    """A round of a transform of RGB images to normalised tensors."""

    def crop(index: int) -> Tensor:
        with folder.open(index) as image:
            return transform(image.convert("RGB"))

    def run() -> None:
        torch.manual_seed(seed)
        for batch in batches(indices):
            torch.stack([crop(i) for i in batch])

    return run


def batches(indices: list[int]) -> list[list[int]]:
    return [indices[first : first + BATCH] for first in range(0, len(indices), BATCH)]


def torchvision_v1(size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    t = module("torchvision.transforms")
    crop = t.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=t.InterpolationMode.BICUBIC)
    return t.Compose([crop, t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def torchvision_v2(size: tuple[int, int]) -> Callable[[Image.Image], Tensor]:
    """In the order that torchvision recommends for speed: a tensor first, in uint8 up to the end."""
    t = module("torchvision.transforms.v2")
    crop = t.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=t.InterpolationMode.BICUBIC, antialias=True)
    to_float = t.ToDtype(torch.float32, scale=True)
    return t.Compose([t.ToImage(), crop, t.RandomHorizontalFlip(), to_float, t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def module(name: str) -> Any:
    """A library's module. Raises UserError with the reason where it can't be imported."""
    entry(name, "Compose")
    return sys.modules[name]


CANDIDATES = {"torchvision v1": torchvision_v1, "torchvision v2": torchvision_v2}


def differences(folder: ImageFolder, indices: list[int], size: tuple[int, int], seed: int) -> tuple[float, int]:
    """Mean and maximum absolute difference of this package's pixels from those of the same boxes, decoded in full."""
    found = []
    for index in indices:
        with folder.open(index) as image:
            pixels = load_crop(image, size, 3, random_numbers(seed, index))
        with folder.open(index) as image:
            whole = to_eight_bits(ImageOps.exif_transpose(image), 3)
        rng = random_numbers(seed, index)
        box, flip = random_crop_box(*whole.size, rng), rng.random() < 0.5
        expected = np.asarray(expected_crop(whole, box, size))
        found.append(np.abs(pixels.astype(int) - (expected[:, ::-1] if flip else expected)))
    return float(np.mean(found)), int(np.max(found))


def expected_crop(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """A box of an image as torchvision crops it, or Pillow where that can't be imported."""
    left, top, right, bottom = box
    try:
        crop = entry("torchvision.transforms.functional", "resized_crop")
        mode = entry("torchvision.transforms", "InterpolationMode").BICUBIC
    except UserError:
        return image.crop(box).resize(size[::-1], Image.Resampling.BICUBIC)
    return crop(image, top, left, bottom - top, right - left, list(size), mode, antialias=True)
