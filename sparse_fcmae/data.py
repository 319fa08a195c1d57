"""A folder of images -> augmented uint8 batches, every sample determined by (seed, epoch, index) alone."""

import hashlib
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_fcmae.errors import UserError
from sparse_fcmae.files import one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRIES = 10  # samples drawn in place of an unreadable one
ORIENTATION = 0x0112  # EXIF tag
MIRRORED = (2, 3, 6, 7), (3, 4, 7, 8)  # orientations whose columns or rows come in reverse
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow identifies but can't decode by itself
FINER = 2  # crops decoded at a reduced scale have this many times the pixels of the result, a side: fewer would show
CROPS, ORDER = 1, 2  # tell apart the random numbers that are drawn for one seed


class ImageFolder:
    """The image files under a folder, at any depth, in a fixed order.

    `files` are relative paths, sorted; `fingerprint` a digest of them. Left out are hidden files and folders, and the
    folder `without`, so that a run inside its own data does not train on its pictures. Raises UserError where there is
    no such folder, one can't be read, or there is no image.
    """

    def __init__(self, root: str | os.PathLike, without: str | os.PathLike | None = None) -> None:
        self.root = Path(root)
        if not os.path.isdir(root):
            what = "is a file, name the folder that holds the images" if os.path.isfile(root) else "no such folder"
            raise UserError(f"--data {root}: {what}")
        Image.preinit()  # the common formats first, or every JPEG is tried as a dozen others before
        Image.init()
        extensions = {e for e, name in Image.registered_extensions().items() if name in set(Image.OPEN) - NOT_IMAGES}
        self.files = sorted(
            os.path.relpath(os.path.join(folder, name), root)
            for folder, names in _walk(root, without)
            for name in names
            if os.path.splitext(name)[1].lower() in extensions and not name.startswith(".")
        )
        if not self.files:
            raise UserError(f"--data {root}: no image files in this folder or below it")
        self.fingerprint = hashlib.sha256("\n".join(self.files).encode(errors="surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        """The file's image, not decoded yet."""
        return Image.open(self.root / self.files[index])


def _walk(root: str | os.PathLike, without: str | os.PathLike | None) -> Iterator[tuple[str, list[str]]]:
    """Every folder once, links followed, and the names of its files."""

    def unreadable(error: OSError) -> NoReturn:
        raise UserError(f"--data {root}: can't read {error.filename}: {error.strerror}")

    seen = {os.path.realpath(without)} if without else set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield folder, names


def random_crop_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float] = (0.2, 1.0)
) -> tuple[int, int, int, int]:
    """Random resized crop: (left, top, right, bottom) with an area share uniform in `scale` and a log-uniform aspect
    ratio in [3/4, 4/3]; after ten boxes that do not fit, the largest centred one of such a ratio."""
    area, low, high = width * height, 3 / 4, 4 / 3
    for _ in range(10):
        target = area * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_crop_box(width: int, height: int, aspect: float, share: float = 1.0) -> tuple[int, int, int, int]:
    """The largest centred box of width / height = `aspect`, times a `share` of its sides."""
    w, h = (round(share * side) for side in (min(width, height * aspect), min(height, width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(w, 1), top + max(h, 1)


def crop_share(size: tuple[int, int]) -> float:
    """The share of an image's sides that is looked at in evaluation: the paper's, and all of small images."""
    return 0.875 if 64 < min(size) < 384 else 1.0


def load_crop(
    image: Image.Image,
    size: tuple[int, int],
    in_chans: int,
    rng: np.random.Generator | None = None,
    *,
    least: float = 0.2,
    augment: Callable[[Image.Image, np.random.Generator], Image.Image] | None = None,
    share: float = 1.0,
) -> np.ndarray:
    """Decodes and crops an opened image: uint8 [H, W, in_chans] with (H, W) = `size`.

    With `rng`, random resized crop of at least the share `least` of the area, horizontal flip, and what `augment` makes
    of the result; without, a `share` of the sides of the largest centred crop. Bicubic with antialiasing, mostly by
    torch, which takes a fifth of Pillow's time. JPEGs are decoded at a reduced scale where the crop allows it.
    """
    height, width = size
    reducible = image.format in ("JPEG", "MPO")
    if not reducible:  # turned at once, as some of these formats' readers turn by themselves when they decode
        ImageOps.exif_transpose(image, in_place=True)
    orientation = image.getexif().get(ORIENTATION, 1)
    full = image.size[::-1] if 5 <= orientation <= 8 else image.size  # files have others too, which mean nothing
    if rng is not None:
        box, flip = random_crop_box(*full, rng, (least, 1.0)), rng.random() < 0.5
    else:
        box, flip = centre_crop_box(*full, width / height, share), False

    scale = 1.0
    if reducible:
        scale = _reduce(image, min((box[2] - box[0]) / width, (box[3] - box[1]) / height) / FINER)
        ImageOps.exif_transpose(image, in_place=True)
    image = to_eight_bits(image, in_chans)
    if scale == 1:
        pixels = F.interpolate(_as_tensor(image.crop(box)), size, mode="bicubic", antialias=True)
    else:  # the box lies between pixels, which only Pillow allows
        x, y = (s - scale * f if orientation in m else 0 for s, f, m in zip(image.size, full, MIRRORED, strict=True))
        box = (scale * box[0] + x, scale * box[1] + y, scale * box[2] + x, scale * box[3] + y)
        pixels = _as_tensor(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
    if augment and rng is not None:
        array = pixels[0].movedim(0, -1).numpy()
        pixels = _as_tensor(augment(Image.fromarray(array[..., 0] if in_chans == 1 else array), rng))
    if flip:
        pixels = pixels.flip(-1)
    return pixels[0].movedim(0, -1).contiguous().numpy()


def _reduce(image: Image.Image, by: float) -> float:
    """Has a JPEG be decoded at 1/2, 1/4 or 1/8 of its sides, the least that is not below 1 / `by`; that scale, or 1."""
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width / by), math.ceil(height / by)))
    return drafted[1][2] / width if drafted else 1.0


def _as_tensor(image: Image.Image) -> Tensor:
    """uint8 [1, C, H, W], channels last in memory."""
    array = np.array(image)  # a copy, as torch wants what it may write to
    return torch.from_numpy(array.reshape(1, *array.shape[:2], -1)).movedim(-1, 1)


def to_eight_bits(image: Image.Image, in_chans: int) -> Image.Image:
    """RGB (3 channels) or greyscale (1) of any mode.

    Transparent pixels become white, integers beyond 255 lose their low byte of two, floating-point values are stretched
    from their least to their greatest.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535)
        deep = image.mode != "I" or values.max() > 255
        image = Image.fromarray((values >> 8 if deep else values).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        low, span = values.min(), max(float(np.ptp(values)), 1e-12)
        image = Image.fromarray(((values - low) * (255 / span)).round().astype(np.uint8))
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if in_chans == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


class BadImage(NamedTuple):
    """A file that could not be read: its path below the folder, and the decoder's reason."""

    file: str
    reason: str


class Batch(NamedTuple):
    """pixels: uint8 [B, H, W, C]. index: int64 [B], the images in the folder that they show. bad: the files that were
    found unreadable on the way."""

    pixels: Tensor
    index: Tensor
    bad: list[BadImage]


Sample = tuple[
    np.ndarray | None, int, list[BadImage]
]  # the pixels, None where unreadable, of what image, bad files met


class AugmentedImages(Dataset):
    """Crops of an `ImageFolder` under keys (epoch, index); unreadable files are replaced by random others.

    least, augment: as in `load_crop`.
    """

    def __init__(
        self,
        folder: ImageFolder,
        size: tuple[int, int],
        in_chans: int,
        seed: int,
        *,
        least: float = 0.2,
        augment: Callable[[Image.Image, np.random.Generator], Image.Image] | None = None,
    ) -> None:
        self.folder, self.size, self.in_chans, self.seed = folder, size, in_chans, seed
        self.least, self.augment = least, augment

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The sample, without pixels where TRIES files in a row could not be read."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, CROPS, epoch, index))
        bad = []
        for _ in range(TRIES):
            try:
                with self.folder.open(index) as image:
                    crop = load_crop(image, self.size, self.in_chans, rng, least=self.least, augment=self.augment)
                    return crop, index, bad
            except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
                bad.append(_bad(self.folder, index, error))
                index = int(rng.integers(len(self.folder)))
        return None, index, bad


class CentredImages(Dataset):
    """Centred crops of an `ImageFolder`, each a `share` of the sides of the largest; unreadable files are left out."""

    def __init__(self, folder: ImageFolder, size: tuple[int, int], in_chans: int, share: float) -> None:
        self.folder, self.size, self.in_chans, self.share = folder, size, in_chans, share

    def __getitem__(self, index: int) -> Sample:
        try:
            with self.folder.open(index) as image:
                return load_crop(image, self.size, self.in_chans, share=self.share), index, []
        except Exception as error:
            return None, index, [_bad(self.folder, index, error)]


def _bad(folder: ImageFolder, index: int, error: Exception) -> BadImage:
    return BadImage(folder.files[index].encode(errors="backslashreplace").decode(), one_line(error))


def _collate(samples: list[Sample]) -> Batch:
    """The readable ones of a batch."""
    pixels = [pixels for pixels, _, _ in samples if pixels is not None]
    index = torch.tensor([index for pixels, index, _ in samples if pixels is not None], dtype=torch.int64)
    bad = [entry for _, _, entries in samples for entry in entries]
    return Batch(torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, dtype=torch.uint8), index, bad)


def micro_batches(
    images: int, batch_size: int, steps: range, seed: int, rank: int, world: int, micro_batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """The keys (epoch, index) of each micro-batch of a rank, for optimiser steps counted from 0 over all epochs.

    An epoch is a random permutation of the images, its incomplete last batch dropped. The order depends on the seed
    alone: ranks take consecutive shares of the global batch.
    """
    per_epoch, share = images // batch_size, batch_size // world
    order_of = None
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        if epoch != order_of:
            order, order_of = np.random.default_rng((seed, ORDER, epoch)).permutation(images), epoch
        first = place * batch_size + rank * share
        mine = [(epoch, int(i)) for i in order[first : first + share]]
        for start in range(0, share, micro_batch_size):
            yield mine[start : start + micro_batch_size]


def make_loader(dataset: Dataset, batches: Iterable[list], workers: int, pin_memory: bool) -> DataLoader:
    """A loader of `Batch`es on `workers` processes (0: in this one)."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_ctrl_c_to_the_trainer,
    )


def _leave_ctrl_c_to_the_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # SIGTERM must go on working: it ends workers that are left at exit


def channel_stats(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that images are normalised with: ImageNet's."""
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,) * in_chans, (sum(IMAGENET_STD) / 3,) * in_chans


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W], normalised, on the same device."""
    mean, std = _stats_on(pixels.device, pixels.shape[-1], pixels.shape[-2])
    rows = pixels.flatten(2).float()  # in whole rows, as CPUs are slow at broadcasting along three channels
    return rows.sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)


@cache
def _stats_on(device: torch.device, channels: int, width: int) -> tuple[Tensor, Tensor]:
    """Of a row of pixels [width * channels]. Made once, as making them waits for a GPU."""
    mean, std = (255 * torch.tensor(s, device=device).repeat(width) for s in channel_stats(channels))
    return mean, std
