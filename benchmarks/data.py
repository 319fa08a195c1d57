"""Images a second on one core, from files to normalised batches: this package's random crops against torchvision's.

Every candidate decodes the same files with Pillow, in this process and taking turns, and ends in normalised float32
batches. torchvision's transforms are in the recipe of MAE and FCMAE: v1 on Pillow images, as published, v2 on tensors.
Ours is refused where its pixels are not those of Pillow in the same boxes, by which torchvision's v1 resizes too.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sparse_fcmae.benchmarks.config import DataConfig
from sparse_fcmae.benchmarks.engine import Candidate, Run, benchmark, take_turns
from sparse_fcmae.benchmarks.gates import PIXELS
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.data.batches import EvaluationImages, Sample, TrainingImages
from sparse_fcmae.data.decoders.photograph import to_eight_bits
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import RandomView, random_crop_box
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of
from sparse_fcmae.runtime.streams import Stream, numpy_generator
from sparse_fcmae.weights.adapter import entry

OURS = "sparse-fcmae"
BATCH = 32  # images that are stacked and normalised at once
COMPARED = 32  # images whose pixels are compared
Transform = Callable[[Image.Image], Tensor]  # of an RGB image to a normalised tensor
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
    decoded = EvaluationImages(source, lambda file: Image.open(file).load())
    indices = [i for i in looked_at if not decoded[i].bad]
    if not indices:
        raise UserError(f"`data` {config.data}: none of the first {len(looked_at)} images can be read")
    count, crops = len(indices), TrainingImages(source, RandomView(size), config.seed)
    row = {"images": count, "unreadable": len(looked_at) - count or None}

    def theirs(make: Callable[[tuple[int, int]], Transform]) -> Run:
        transform = make(size)
        images = EvaluationImages(source, lambda file: transform(Image.open(file).convert("RGB")))
        return partial(load_all, lambda index: images[index], indices, config.seed)

    ours = partial(load_all, lambda index: crops[0, index], indices, config.seed, ImageFormat.imagenet().normalise)
    gate = partial(same_pixels, crops, indices[:COMPARED])
    candidates = [Candidate(OURS, lambda: ours, {"candidate": OURS} | row, count, gate)]
    for name, make in CANDIDATES.items():
        candidates.append(Candidate(name, partial(theirs, make), {"candidate": name} | row, count))
    turns = take_turns(candidates, config.rounds, device)
    yield turns.table(lambda name: {"ms": turns.speed(name)["ms"] / count, "ours_over_it": turns.ratio(name, OURS)})


def load_all(
    load: Callable[[int], Sample],
    indices: list[int],
    seed: int,
    finish: Callable[[Tensor], Tensor] = lambda batch: batch,
) -> None:
    """Loads every image once. finish: normalises a batch, where what is loaded is not normalised."""
    torch.manual_seed(seed)
    for first in range(0, len(indices), BATCH):
        finish(torch.stack([load(index).pixels for index in indices[first : first + BATCH]]))


def torchvision_transform(module: str, size: tuple[int, int]) -> Transform:
    """torchvision's transforms in a module of its.

    Those of v1 are for Pillow images, as published. Those of v2 are in the order that torchvision recommends for speed:
    a tensor first, in uint8 up to the end.
    """
    entry(module, "Compose")  # raises UserError with the reason where it can't be imported
    t = import_module(module)
    crop = t.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=t.InterpolationMode.BICUBIC, antialias=True)
    crop_and_flip, norm = [crop, t.RandomHorizontalFlip()], t.Normalize(*ImageFormat.imagenet().in_units)
    if module.endswith("v2"):
        return t.Compose([t.ToImage(), *crop_and_flip, t.ToDtype(torch.float32, scale=True), norm])
    return t.Compose([*crop_and_flip, t.ToTensor(), norm])


CANDIDATES = {
    "torchvision v1": partial(torchvision_transform, "torchvision.transforms"),
    "torchvision v2": partial(torchvision_transform, "torchvision.transforms.v2"),
}


def same_pixels(crops: TrainingImages, indices: list[int], run: Run, passed: Mapping[Any, Run]) -> Row:
    """The gate of random crops: how far their pixels are from those of the same boxes, as Pillow resizes them."""
    found = []
    for index in indices:
        pixels = crops[0, index].pixels.numpy()
        with crops.source.open(index) as file:
            whole = to_eight_bits(ImageOps.exif_transpose(Image.open(file)), 3)
        rng = numpy_generator(crops.seed, Stream.CROPS, 0, index)
        box, flip = random_crop_box(*whole.size, rng), rng.random() < 0.5
        expected = np.asarray(whole.crop(box).resize(crops.view.size[::-1], Image.Resampling.BICUBIC))
        found.append(np.abs(pixels.astype(int) - (expected[:, ::-1] if flip else expected)))
    mean = float(np.mean(found))
    return {"difference": mean, "max_difference": int(np.max(found))} | PIXELS(mean)
