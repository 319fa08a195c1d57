"""Labelled images: a folder for each class, or a table; and which of them are trained on and which are held out."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.channel_files import ChannelFiles
from sparse_fcmae.data.sources.files import printable
from sparse_fcmae.data.sources.folder import ImageFolder, check_folder
from sparse_fcmae.data.sources.labelled import SPLITS, Labelled
from sparse_fcmae.data.sources.opening import is_named, open_images, open_rows
from sparse_fcmae.data.splits import hold_out
from sparse_fcmae.runtime.errors import UserError

TRAIN = "train"
SHOWN = 5  # classes that a note names
HELD_OUT = ("val", "test")  # folders of held-out images, the preferred one first
USUAL = SourceConfig()


def class_folder(
    root: str | os.PathLike, out: str | os.PathLike | None = None, config: SourceConfig = USUAL
) -> Labelled:
    """Images in one folder for each class. The classes are the folders' names, sorted.

    Raises UserError as `open_images` does, for images outside of the class folders, for class folders without images,
    and where `out`, the folder that a run is to write to, lies among the class folders.
    """
    images = ChannelFiles(root, config.channel_files) if config.channel_files else ImageFolder(root)
    if out is not None and Path(out).resolve().is_relative_to(images.root.resolve()):
        raise UserError(f"`out` {out} lies among the class folders of {root}: choose another")
    names = images.names if config.channel_files else images.files
    folders = [sys.intern(name.partition(os.sep)[0]) for name in names]  # not a string for each image
    if loose := next((name for name in names if os.sep not in name), None):
        raise UserError(f"{root}: {printable(loose)} lies in no class folder: make a folder below it for each class")
    there = {p.name for p in images.root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if not config.channel_files and (empty := sorted(there - set(folders))):
        raise UserError(f"{root}: class folder {empty[0]} holds no images: fill or remove it")
    return Labelled.by_names(images, folders, labels_in_names=True)


def open_described(data: Any, config: SourceConfig = USUAL) -> ImageSource | Labelled:
    """The images of any source, all splits of them, with their classes where these are known.

    They are where a table or the like has one for every image, and where all files of a folder lie in class folders, be
    it within folders of splits.
    """
    rows = open_rows(data, config) if is_named(data) and isinstance(data, str | os.PathLike) else None
    if rows and rows.labels is not None and "" not in rows.labels:
        return rows.labelled()
    images = open_images(data, config=config)
    names = folders_of(images.files) if isinstance(images, ImageFolder) else None
    return Labelled.by_names(images, names, labels_in_names=True) if names else images


def folders_of(files: Sequence[str]) -> list[str] | None:
    """The class folder of each of the paths below a folder; None where they are not all in one."""
    places = [name.split(os.sep)[:-1] for name in files]
    if all(len(place) == 1 for place in places):
        return [sys.intern(place[0]) for place in places]
    if all(len(place) == 2 and place[0].lower() in SPLITS for place in places):
        return [sys.intern(place[1]) for place in places]
    return None


def open_held_out(root: str | os.PathLike, config: SourceConfig = USUAL, of_classes: bool = True) -> Labelled:
    """The images to evaluate on: those of ROOT/val or ROOT/test, or those of ROOT where it holds no splits.

    Of a table they are the rows of the split val or test, or all where there is no split. of_classes: as in
    `open_splits`. Raises UserError where there are images to train on alone.
    """
    if rows := open_rows(root, config):
        if rows.splits is None:
            return rows.labelled(None, of_classes)
        if not (held_out := rows.of_split(*HELD_OUT)):
            raise UserError(f"{root} has no rows of the split {' or '.join(HELD_OUT)}")
        return rows.labelled(held_out, of_classes)
    root = Path(root)
    held_out = held_out_folder(root)
    if held_out is None and (root / TRAIN).is_dir():
        raise UserError(f"{root} has no folder {' or '.join(HELD_OUT)}: name a folder of classes")
    return class_folder(held_out or root, config=config)


def open_splits(
    root: str | os.PathLike,
    val_split: float | None,
    seed: int,
    out: str | os.PathLike | None = None,
    config: SourceConfig = USUAL,
    of_classes: bool = True,
) -> tuple[Labelled, Labelled]:
    """Training and held-out images.

    Without `val_split` they are those of ROOT/train and of ROOT/val or ROOT/test, or of a table the rows of these
    splits. With it, that fraction of each class in the one folder, ROOT/train or else ROOT, is held out at random, or
    of a table without splits. Both have the same classes, unless `of_classes` is False: labels are then any texts, of
    which each part has its own. Classes without held-out images are named in the notes of the
    training images. Raises UserError as `class_folder` and `open_rows` do, where the folders or splits that this needs
    are missing, and where a held-out class has no images to train on.
    """
    if val_split is None:
        return open_train_and_held_out(
            root, out, "make one, or hold images out with `val_split=0.1`", config, of_classes
        )
    if rows := open_rows(root, config):
        if rows.of_split(*HELD_OUT):
            raise UserError(f"{root} has splits already: leave `val_split` out")
        labelled = rows.labelled(rows.of_split(TRAIN) if rows.splits else None, of_classes)
        train, val = hold_out(labelled, val_split, seed, of_classes)
        train.notes += without_held_out(val) if of_classes else []
        return train, val
    root = Path(root)
    has_train, held_out = (root / TRAIN).is_dir(), held_out_folder(root)
    if has_train and held_out:
        raise UserError(f"{root} has {held_out.name} already: leave `val_split` out")
    labelled = class_folder(root / TRAIN if has_train else root, out, config)
    train, val = hold_out(labelled, val_split, seed, of_classes)
    train.notes += without_held_out(val) if of_classes else []
    return train, val


def open_train_and_held_out(
    root: str | os.PathLike,
    out: str | os.PathLike | None = None,
    remedy: str = "make one",
    config: SourceConfig = USUAL,
    of_classes: bool = True,
) -> tuple[Labelled, Labelled]:
    """The images of ROOT/train, and those of ROOT/val or ROOT/test, or of a table the rows of these splits.

    remedy: what to do where one of them is missing. of_classes: as in `open_splits`.
    """
    if rows := open_rows(root, config):
        trained, held = rows.of_split(TRAIN), rows.of_split(*HELD_OUT)
        if not trained or not held:
            missing = " or ".join(HELD_OUT) if trained else TRAIN
            column = "" if rows.splits else "; `split_column` names the column that says it"
            raise UserError(f"{root} has no rows of the split {missing}: {remedy}{column}")
        train, val, where = *(rows.labelled(part, of_classes) for part in (trained, held)), "held-out rows"
    else:
        check_folder(root)
        root = Path(root)
        has_train, held_out = (root / TRAIN).is_dir(), held_out_folder(root)
        if not has_train or held_out is None:
            missing = " or ".join(HELD_OUT) if has_train else TRAIN
            raise UserError(f"{root} has no folder {missing}: {remedy}")
        train, val, where = (*(class_folder(part, out, config) for part in (root / TRAIN, held_out)), held_out.name)
    if not of_classes:
        return train, val
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise UserError(f"{root}: class {unknown[0]} of {where} is missing in {TRAIN}")
    val = val.with_classes(train.classes)
    train.notes += without_held_out(val)
    return train, val


def without_held_out(held_out: Labelled) -> list[str]:
    """A line about the classes that have no held-out images, where there are any."""
    missing = [name for name, images in zip(held_out.classes, held_out.counts(), strict=True) if not images]
    if not missing:
        return []
    named = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    return [
        f"{len(missing)} of {len(held_out.classes)} classes have no held-out images, and no part in accuracy: {named}"
    ]


def held_out_folder(root: Path) -> Path | None:
    """ROOT/val or ROOT/test, or None where neither is there."""
    return next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
