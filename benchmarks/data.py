"""Images a second on one core, from files to normalised batches: this package's random crops against torchvision's.

Every candidate decodes the same files with Pillow, in this process and taking turns, and ends in normalised float32
batches. torchvision's transforms are in the recipe of MAE and FCMAE: v1 on Pillow images, as published, v2 on tensors.
Ours is refused where its pixels are not those of Pillow in the same boxes, by which torchvision's v1 resizes too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sparse_fcmae.benchmarks.config import DataConfig
from sparse_fcmae.benchmarks.engine import Candidate, Checked, Run, benchmark, take_turns
from sparse_fcmae.benchmarks.gates import PIXELS
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.data.decode import to_eight_bits
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.statistics import IMAGENET_MEAN, IMAGENET_STD, normalise
from sparse_fcmae.data.views import RandomView, random_crop_box
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of
from sparse_fcmae.runtime.streams import Stream, numpy_generator
from sparse_fcmae.weights.adapter import entry

OURS = "sparse-fcmae"
BATCH = 32  # images that are stacked and normalised at once
COMPARED = 32  # images whose pixels are compared
Transform = Callable[[Image.Image], Tensor]  # of an RGB image to a normalised tensor
MakeTransform = Callable[[tuple[int, int]], Transform]  # given (height, width)
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


@benchmark("data", DataConfig, COLUMNS, threads=1)  # as a process of a loader has
def data(config: DataConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns a row for each candidate, ours first.

    difference, max_difference: of pixels, of 255. unreadable: files that were left out. Raises UserError for wrong
    options and where no image can be read.
    """
    size = image_size_of(config.image_size)
    if min(size) < 1:
        raise UserError(f"`image_size` {config.image_size} must be greater than 0")
    if not config.data:
        raise UserError("`data` is missing: name the folder with the images")
    source = ImageFolder(config.data)
    looked_at = range(min(config.images, len(source)))
    indices = [i for i in looked_at if readable(source, i)]
    if not indices:
        raise UserError(f"`data` {config.data}: none of the first {len(looked_at)} images can be read")
    count, given = len(indices), (source, indices, size, config.seed)
    row = {"images": count, "unreadable": len(looked_at) - count or None}
    candidates = [Candidate(OURS, partial(ours, *given), {"candidate": OURS} | row, count, gate=PIXELS)]
    for name, make in CANDIDATES.items():
        candidates.append(Candidate(name, partial(theirs, *given, make), {"candidate": name} | row, count))
    turns = take_turns(candidates, config.rounds, device)

    def figures(name: str) -> Row:
        speed = turns.speed(name)
        return speed | {"ms": 1e3 / speed["images_per_second"], "ours_over_it": turns.ratio(name, OURS)}

    yield turns.table(figures)


def readable(source: ImageSource, index: int) -> bool:
    """Whether an image can be decoded."""
    try:
        with source.open(index) as file:
            Image.open(file).load()
    except Exception:  # Pillow's decoders raise nearly anything on a broken file
        return False
    return True


def ours(source: ImageSource, indices: list[int], size: tuple[int, int], seed: int) -> Checked:
    """This package's crops."""
    view = RandomView(size, in_chans=3)
    mean, greatest = differences(source, view, indices[:COMPARED], seed)
    run = round_of(source, indices, seed, lambda file, index: view(file, random_numbers(seed, index)), normalise)
    return Checked(run, mean, {"difference": mean, "max_difference": greatest})


def theirs(source: ImageSource, indices: list[int], size: tuple[int, int], seed: int, make: MakeTransform) -> Run:
    """Another library's crops."""
    transform = make(size)
    return round_of(source, indices, seed, lambda file, index: transform(Image.open(file).convert("RGB")))


def round_of(
    source: ImageSource,
    indices: list[int],
    seed: int,
    crop: Callable[[BinaryIO, int], Tensor],
    finish: Callable[[Tensor], Tensor] = lambda batch: batch,
) -> Run:
    """Every image once. crop: makes the pixels of a file, given its index too. finish: makes batches normalised."""

    def load(index: int) -> Tensor:
        with source.open(index) as file:
            return crop(file, index)

    def run() -> None:
        torch.manual_seed(seed)
        for first in range(0, len(indices), BATCH):
            finish(torch.stack([load(i) for i in indices[first : first + BATCH]]))

    return run


def random_numbers(seed: int, index: int) -> np.random.Generator:
    """What an image's crop is drawn from."""
    return numpy_generator(seed, Stream.CROPS, 0, index)


def torchvision_v1(size: tuple[int, int]) -> Transform:
    """On Pillow images, as published."""
    entry("torchvision.transforms", "Compose")  # raises UserError with the reason where it can't be imported
    from torchvision import transforms as t

    crop = t.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=t.InterpolationMode.BICUBIC)
    return t.Compose([crop, t.RandomHorizontalFlip(), t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def torchvision_v2(size: tuple[int, int]) -> Transform:
    """In the order that torchvision recommends for speed: a tensor first, in uint8 up to the end."""
    entry("torchvision.transforms.v2", "Compose")
    from torchvision.transforms import v2 as t

    crop = t.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=t.InterpolationMode.BICUBIC, antialias=True)
    to_float = t.ToDtype(torch.float32, scale=True)
    return t.Compose([t.ToImage(), crop, t.RandomHorizontalFlip(), to_float, t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


CANDIDATES = {"torchvision v1": torchvision_v1, "torchvision v2": torchvision_v2}


def differences(source: ImageSource, view: RandomView, indices: list[int], seed: int) -> tuple[float, int]:
    """Mean and greatest absolute difference of a view's pixels from those of the same boxes, as Pillow resizes them."""
    found = []
    for index in indices:
        with source.open(index) as file:
            pixels = view(file, random_numbers(seed, index)).numpy()
        with source.open(index) as file:
            whole = to_eight_bits(ImageOps.exif_transpose(Image.open(file)), 3)
        rng = random_numbers(seed, index)
        box, flip = random_crop_box(*whole.size, rng), rng.random() < 0.5
        expected = np.asarray(whole.crop(box).resize(view.size[::-1], Image.Resampling.BICUBIC))
        found.append(np.abs(pixels.astype(int) - (expected[:, ::-1] if flip else expected)))
    return float(np.mean(found)), int(np.max(found))
