"""Images that each have a mask: paired by their paths, or by the rows of a table or data set."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sparse_fcmae.data.config import MaskConfig
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.masks import read_mask
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.derived import Annotated
from sparse_fcmae.data.sources.files import ImageFiles, printable
from sparse_fcmae.data.sources.folder import check_folder, images_among, note_of_runs, paths_below
from sparse_fcmae.data.sources.hugging_face import names_dataset
from sparse_fcmae.data.sources.labelled import SPLITS, Rows, Some
from sparse_fcmae.data.sources.opening import open_rows
from sparse_fcmae.data.sources.shards import TarShards
from sparse_fcmae.data.sources.table import names_table, read_table
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line
from sparse_fcmae.runtime.options import check_unused
from sparse_fcmae.runtime.streams import Stream, numpy_generator

IMAGE_FOLDERS = ("images", "image", "imgs", "img")  # what the folders are called, where both are below one
MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "gt")
MASK_COLUMNS = ("mask", "mask_path", "annotation", "segmentation_mask", "segmentation", "label_map")
MASK_PARTS = ("mask", "seg", "segmentation", "annotation", "label")  # of a mask's name in an archive, as 7.mask.png
COLUMNS = ("path_column", "label_column", "split_column", "mask_column")  # options about tables
HELD_OUT = ("val", "test")
NAMED = 3  # images that a message names


@dataclass
class Pair:
    """An image and its mask, open."""

    image: Any
    mask: Any


class MaskedImages(Annotated):
    """Images of a source, and a mask for each. source, masks: as many of both, in the same order."""

    def __init__(self, source: ImageSource, masks: ImageSource) -> None:
        self.source, self.masks, self.notes = source, masks, list(source.notes)

    @cached_property
    def fingerprint(self) -> str:
        return sha256(f"{self.source.fingerprint} {self.masks.fingerprint}".encode()).hexdigest()

    @contextmanager
    def open(self, index: int) -> Iterator[Pair]:
        """The image and its mask, which are closed at the end."""
        with ExitStack() as files:
            yield Pair(*(files.enter_context(source.open(index)) for source in (self.source, self.masks)))

    def version(self) -> str | None:
        """Of images and masks together."""
        versions = self.source.version(), self.masks.version()
        return None if None in versions else " ".join(versions)

    def take(self, indices: Sequence[int]) -> "MaskedImages":
        """These images alone."""
        return MaskedImages(Some(self.source, indices), Some(self.masks, indices))


@dataclass(frozen=True)
class SplitImages:
    """Images with masks, and what says in which split each is. splits: None where nothing does."""

    images: MaskedImages
    rows: Rows

    @property
    def splits(self) -> Sequence[str] | None:
        return self.rows.splits

    def part(self, *names: str) -> MaskedImages | None:
        """The images of the first of these splits that there is. Raises UserError for another split's name."""
        found = self.rows.of_split(*names)
        return self.images.take(found) if found else None


def open_masked(data: str, config: MaskConfig) -> SplitImages:
    """All images that `data` names, with their masks.

    data: a table or data set with a column of masks, archives with both, or a folder. Of a folder `masks` names that of
    the masks, where each has the path of its image, but for the ending and what `mask_name` says. Without `masks` both
    are below `data`, in folders of such names as IMAGE_FOLDERS and MASK_FOLDERS. Masks without an image are left out,
    and counted in the notes. Folders of runs are left out. Raises UserError for an image without a mask.
    """
    if config.channel_files:
        raise UserError("`channel_files` can't be paired with masks: name the files of both in a table")
    if rows := open_rows(data, config):
        if config.mask_name:
            raise UserError(f"`mask_name` goes with folders: {data} names the masks itself")
        if isinstance(rows.source, TarShards):
            if config.masks:
                raise UserError(f"`masks` goes with a folder of images: in {data} the mask of 7.jpg is 7.mask.png")
            check_unused(config, COLUMNS, "goes with a table")
            return _in_archives(rows.source, rows)
        if config.masks:
            raise UserError(f"`masks` goes with a folder of images: in {data} name the column by `mask_column`")
        if not (names_table(data) or names_dataset(data)):
            raise UserError(f"{data}: a folder behind an address can't be paired: name the files of both in a table")
        images = MaskedImages(rows.source, _masks_of_rows(data, config))
        images.source.notes = [*images.notes, *rows.notes()]
        return SplitImages(images, rows)
    check_folder(data)
    check_unused(config, COLUMNS, "goes with a table")
    images, notes, root, masks, expected = (_in_two_places if config.masks else _side_by_side)(data, config)
    if not images:
        raise UserError(f"{data}: no image files in this folder or below it")
    paired = _paired(images, expected, masks, root)
    if spare := len(set(masks) - set(paired)):
        notes.append(f"left out, as they are masks of no image: {spare} files in {root}")
    sources = ImageFiles(str(data), data, images, notes), ImageFiles(str(root), root, paired)
    return SplitImages(MaskedImages(*sources), Rows(sources[0], None, _splits_of(data, images)))


def open_masked_splits(
    data: str, config: MaskConfig, val_split: float | None, seed: int
) -> tuple[MaskedImages, MaskedImages]:
    """Images to train on and images that are held out. val_split: the fraction that is held out at random, if any."""
    found = open_masked(data, config)
    train, held_out = found.part("train"), found.part(*HELD_OUT)
    if val_split is None:
        if train is None or held_out is None:
            missing = "val or test" if train else "train"
            raise UserError(
                f"{data} has no images of the split {missing}: make one, or hold images out with `val_split=0.1`"
            )
        return train, held_out
    if held_out:
        raise UserError(f"{data} has splits already: leave `val_split` out")
    images = train or found.images
    count = max(1, round(val_split * len(images)))
    if count >= len(images):
        raise UserError(f"`val_split` {val_split} leaves no image to train on: choose less, or add images")
    order = numpy_generator(seed, Stream.SPLIT).permutation(len(images))
    return images.take(sorted(order[count:].tolist())), images.take(sorted(order[:count].tolist()))


def open_masked_held_out(data: str, config: MaskConfig) -> MaskedImages:
    """The images to evaluate on: those of the split val or test, or all where there are no splits."""
    found = open_masked(data, config)
    if found.splits is None:
        return found.images
    if (held_out := found.part(*HELD_OUT)) is None:
        raise UserError(f"{data} has no images of the split {' or '.join(HELD_OUT)}")
    return held_out


def survey_masks(images: MaskedImages, reading: Reading) -> Counter[int]:
    """How many pixels of all masks have each value. Each mask is looked at.

    Raises UserError where a mask can't be read, or has another size than its image. Images that can't be read are left
    to training, which counts them.
    """
    pixels, wrong = Counter[int](), []
    for index in tqdm(range(len(images)), desc="masks", unit="mask", delay=2, leave=False, dynamic_ncols=True):
        try:
            with images.masks.open(index) as file:
                mask = read_mask(file)
        except Exception as error:  # decoders raise nearly anything on a broken file
            wrong.append(f"the mask of {images.name(index)}: {one_line(error)}")
            continue
        pixels.update(dict(zip(*(part.tolist() for part in np.unique(mask, return_counts=True)), strict=True)))
        try:
            with images.source.open(index) as file:
                size = open_image(file, reading).size
        except Exception:
            continue
        if size != mask.shape[::-1]:
            wrong.append(f"the mask of {images.name(index)} {another_size(mask, size)}")
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise UserError(f"{images}: {'; '.join(wrong[:NAMED])}{more}: put them right, or leave these images out")
    return pixels


def another_size(mask: np.ndarray, size: tuple[int, int]) -> str:
    """Words for a mask that has not its image's (width, height)."""
    turned = ", which may be turned by its EXIF: a mask has to be upright" if mask.shape == size else ""
    return f"has {mask.shape[0]}x{mask.shape[1]} pixels, and its image {size[1]}x{size[0]}{turned}"


def _in_archives(shards: TarShards, rows: Rows) -> SplitImages:
    """The images of archives with their masks: that of 7.jpg is 7.mask.png, or 7.seg.png."""
    images: dict[tuple[int, str], int] = {}
    masks: dict[tuple[int, str], int] = {}
    for index in range(len(shards)):
        archive, key, parts = shards.sample(index)
        kind = masks if set(parts) & set(MASK_PARTS) else images
        if (other := kind.setdefault((archive, key), index)) != index:
            what = "masks of one image" if kind is masks else "images of one sample"
            raise UserError(f"{shards.name(other)} and {shards.name(index)} are {what}: keep one")
    without = [shards.name(index) for sample, index in images.items() if sample not in masks]
    if without or not images:
        raise UserError(
            f"{shards}: {len(without)} of {len(images)} images have no mask{_such_as(without)}: the mask of 7.jpg is "
            "called 7.mask.png"
        )
    source = Some(shards, list(images.values()))
    if spare := len(masks) - len(images):
        source.notes.append(f"left out, as they are masks of no image: {spare} files in {shards}")
    splits = rows.splits and [rows.splits[index] for index in images.values()]
    pairs = MaskedImages(source, Some(shards, [masks[sample] for sample in images]))
    return SplitImages(pairs, Rows(source, None, splits))


def _such_as(names: Sequence[str]) -> str:
    """Words that name the first few of names."""
    return f", such as {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}" if names else ""


def _masks_of_rows(data: str, config: MaskConfig) -> ImageSource:
    """The masks that a column of a table or data set names or holds."""
    asked = [config.mask_column] if config.mask_column else MASK_COLUMNS
    for column in asked:
        try:
            if names_table(data):
                return read_table(data, replace(config, path_column=column), unique=False).source
            return open_rows(data, replace(config, path_column=column)).source
        except UserError as error:
            if config.mask_column:
                raise UserError(str(error).replace("`path_column`", "`mask_column`")) from None
            if f"`path_column` {column} is none" not in str(error):
                raise
    raise UserError(f"{data}: no column of masks, as {', '.join(MASK_COLUMNS[:3])}: name it by `mask_column`")


class Found(NamedTuple):
    """Paths of images below one folder and of masks below `root`, and of the masks that the images are to have."""

    images: Sequence[str]
    notes: list[str]
    root: Path
    masks: Sequence[str]
    expected: Sequence[str]


def _in_two_places(data: str, config: MaskConfig) -> Found:
    """Images below `data`, and masks below another folder, which may lie in the former."""
    check_folder(config.masks)
    runs: list[str] = []
    images, notes = images_among(paths_below(data, config.masks, runs=runs))
    masks, _ = images_among(paths_below(config.masks))
    return Found(images, notes + note_of_runs(runs), Path(config.masks), masks, _as_masks(images, config.mask_name))


def _side_by_side(data: str, config: MaskConfig) -> Found:
    """Images and masks in folders below `data` that are called so."""
    runs: list[str] = []
    found, notes = images_among(paths_below(data, runs=runs))
    notes += note_of_runs(runs)
    folder = next((name for name in MASK_FOLDERS if any(_within(path, (name,)) for path in found)), None)
    images = [path for path in found if _within(path, IMAGE_FOLDERS)]
    masks = [path for path in found if folder and _within(path, (folder,))]
    if not images or not masks:
        raise UserError(
            f"{data} has no folders {IMAGE_FOLDERS[0]} and {MASK_FOLDERS[0]}: name that of the masks by `masks`"
        )
    if others := len(found) - len(images) - len(masks):
        notes.append(f"left out, as they are in no folder of images or of masks: {others} files in {data}")
    moved = [os.sep.join(folder if part in IMAGE_FOLDERS else part for part in path.split(os.sep)) for path in images]
    return Found(images, notes, Path(data), masks, _as_masks(moved, config.mask_name))


def _splits_of(data: str, paths: Sequence[str]) -> list[str] | None:
    """The split that a folder of each path names; None where none does. Raises UserError where only some do."""
    splits = [
        next((SPLITS[part.lower()] for part in path.split(os.sep)[:-1] if part.lower() in SPLITS), "") for path in paths
    ]
    if "" in splits and any(splits):
        path = printable(paths[splits.index("")])
        raise UserError(f"{data}: {path} is in no split, and others are: move it into train, val or test")
    return splits if any(splits) else None


def _within(path: str, folders: Sequence[str]) -> bool:
    """Whether a path leads through a folder of one of these names."""
    return any(part in folders for part in path.split(os.sep)[:-1])


def _as_masks(images: Sequence[str], mask_name: str | None) -> list[str]:
    """The paths, without ending, that the masks of images are to have."""
    stems = [os.path.splitext(path)[0] for path in images]
    if not mask_name:
        return stems
    of_image, separator, of_mask = mask_name.partition("=")
    if not separator or not of_image:
        raise UserError(
            f"`mask_name` {mask_name}: give what images' names have and what masks' have there, as _rgb=_mask"
        )
    return [os.path.join(folder, name.replace(of_image, of_mask)) for folder, name in map(os.path.split, stems)]


def _paired(images: Sequence[str], expected: Sequence[str], masks: Sequence[str], root: Path) -> list[str]:
    """The path of each image's mask. Raises UserError where one has none or several."""
    by_stem: dict[str, str] = {}
    for mask in masks:
        stem = os.path.splitext(mask)[0]
        if stem in by_stem:
            raise UserError(
                f"{root}: {printable(by_stem[stem])} and {printable(mask)} are masks of one image: keep one"
            )
        by_stem[stem] = mask
    without = [path for path, stem in zip(images, expected, strict=True) if stem not in by_stem]
    if without:
        raise UserError(
            f"{len(without)} of {len(images)} images have no mask in {root}{_such_as([*map(printable, without)])}: "
            "leave them out, or say by `mask_name` how masks are named"
        )
    return [by_stem[stem] for stem in expected]
