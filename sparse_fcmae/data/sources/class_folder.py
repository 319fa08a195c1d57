"""Labelled images: a folder for each class, and a folder of class folders for each of training and held-out images."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_fcmae.data.sources.files import Paths, fingerprint_of
from sparse_fcmae.data.sources.folder import ImageFolder, check_folder
from sparse_fcmae.data.splits import hold_out
from sparse_fcmae.runtime.errors import UserError

TRAIN = "train"
SHOWN = 5  # classes that a note names
HELD_OUT = ("val", "test")  # folders of held-out images, the preferred one first


class ClassFolder(ImageFolder):
    """Images in one folder for each class.

    classes: the folders' names, sorted. labels: int64 [N], for each image an index into `classes`. Raises UserError as
    `ImageFolder` does, for images outside of the class folders, for class folders without images, and where `out`, the
    folder that a run is to write to, lies among the class folders.
    """

    def __init__(self, root: str | os.PathLike, out: str | os.PathLike | None = None) -> None:
        super().__init__(root)
        if out is not None and Path(out).resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"`out` {out} lies among the class folders of {root}: choose another")
        self.classes = tuple(sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        folders = [Path(file).parts[0] for file in self.files]
        for index, file in enumerate(self.files):
            if folders[index] == file:
                raise UserError(
                    f"{root}: {self.name(index)} lies in no class folder: make a folder below it for each class"
                )
        if empty := sorted(set(self.classes) - set(folders)):
            raise UserError(f"{root}: class folder {empty[0]} holds no images: fill or remove it")
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([label_of[name] for name in folders])

    def with_classes(self, classes: Sequence[str]) -> "ClassFolder":
        """The same images with their labels among these classes, of which some may have no images."""
        other, place = copy.copy(self), {name: label for label, name in enumerate(classes)}
        other.classes = tuple(classes)
        other.labels = torch.tensor([place[name] for name in self.classes])[self.labels]
        return other

    def take(self, indices: Sequence[int]) -> "ClassFolder":
        """These images alone, with the same classes."""
        part = copy.copy(self)
        part.files = Paths(self.files[i] for i in indices)
        part.labels = self.labels[torch.tensor(list(indices), dtype=torch.int64)]
        part.fingerprint, part.notes = fingerprint_of(part.files), list(self.notes)
        return part

    def counts(self) -> list[int]:
        """The images of each class."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()


def open_held_out(root: str | os.PathLike) -> ClassFolder:
    """The images to evaluate on: those of ROOT/val or ROOT/test, or those of ROOT where it holds no splits.

    Raises UserError where ROOT has a folder train alone.
    """
    root = Path(root)
    held_out = held_out_folder(root)
    if held_out is None and (root / TRAIN).is_dir():
        raise UserError(f"{root} has no folder {' or '.join(HELD_OUT)}: name a folder of classes")
    return ClassFolder(held_out or root)


def open_splits(
    root: str | os.PathLike, val_split: float | None, seed: int, out: str | os.PathLike | None = None
) -> tuple[ClassFolder, ClassFolder]:
    """Training and held-out images.

    Without `val_split` they are those of ROOT/train and of ROOT/val or ROOT/test. With it, that fraction of each class
    in the one folder, ROOT/train or else ROOT, is held out at random. Both have the same classes. Classes without
    held-out images are named in the notes of the training images. Raises UserError as `ClassFolder` does, where the
    folders that this needs are missing, and where a held-out class has no images to train on.
    """
    if val_split is None:
        return open_train_and_held_out(root, out, "make one, or hold images out with `val_split=0.1`")
    root = Path(root)
    has_train, held_out = (root / TRAIN).is_dir(), held_out_folder(root)
    if has_train and held_out:
        raise UserError(f"{root} has {held_out.name} already: leave `val_split` out")
    train, val = hold_out(ClassFolder(root / TRAIN if has_train else root, out), val_split, seed)
    train.notes += without_held_out(val)
    return train, val


def open_train_and_held_out(
    root: str | os.PathLike, out: str | os.PathLike | None = None, remedy: str = "make one"
) -> tuple[ClassFolder, ClassFolder]:
    """The images of ROOT/train, and those of ROOT/val or ROOT/test. remedy: what to do where one of them is missing."""
    check_folder(root)
    root = Path(root)
    has_train, held_out = (root / TRAIN).is_dir(), held_out_folder(root)
    if not has_train or held_out is None:
        missing = " or ".join(HELD_OUT) if has_train else TRAIN
        raise UserError(f"{root} has no folder {missing}: {remedy}")
    train, val = ClassFolder(root / TRAIN, out), ClassFolder(held_out, out)
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise UserError(f"{root}: class folder {unknown[0]} of {val.root.name} is missing in {TRAIN}")
    val = val.with_classes(train.classes)
    train.notes += without_held_out(val)
    return train, val


def without_held_out(held_out: ClassFolder) -> list[str]:
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
