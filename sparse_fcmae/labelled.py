"""Folders of images by class: labels, splits, few labels, and where a folder's classes are among a head's outputs."""

import copy
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_fcmae.data import ImageFolder
from sparse_fcmae.errors import UserError

SPLIT, FEW = 4, 5  # beside data.CROPS and data.ORDER
HELD_OUT = ("val", "test")  # folders that are looked for, by preference


class ClassFolder(ImageFolder):
    """Images in one folder a class. classes: the folders' names, sorted. labels: int64, an index into them an image.

    Raises UserError, beside those of `ImageFolder`, for images outside of the class folders and for empty ones.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        super().__init__(root)
        self.classes = tuple(sorted(p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        names = [Path(file).parts[0] for file in self.files]
        for file, name in zip(self.files, names, strict=True):
            if name == file:
                raise UserError(f"--data {root}: {file} lies in no class folder: make a folder a class below it")
        empty = sorted(set(self.classes) - set(names))
        if empty:
            raise UserError(f"--data {root}: class folder {empty[0]} holds no images: fill or remove it")
        places = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([places[name] for name in names])

    def take(self, index: Sequence[int] | np.ndarray) -> "ClassFolder":
        """These images alone; the classes stay."""
        part = copy.copy(self)
        part.files = [self.files[i] for i in index]
        part.labels = self.labels[torch.as_tensor(np.asarray(index, dtype=np.int64))]
        part.fingerprint = hashlib.sha256("\n".join(part.files).encode(errors="surrogateescape")).hexdigest()
        return part

    def few(self, per_class: int, seed: int) -> "ClassFolder":
        """`per_class` random images of every class. Raises UserError where a class has fewer."""
        rng, chosen = np.random.default_rng((seed, FEW)), []
        for label, name in enumerate(self.classes):
            own = np.flatnonzero(self.labels.numpy() == label)
            if len(own) < per_class:
                raise UserError(f"--labels-per-class {per_class}: {name} has {len(own)} images: choose that or less")
            chosen += sorted(rng.permutation(own)[:per_class])
        return self.take(sorted(chosen))

    def split(self, share: float, seed: int) -> tuple["ClassFolder", "ClassFolder"]:
        """The images at random but for a `share` of each class, at least one, and that share."""
        rng, held = np.random.default_rng((seed, SPLIT)), np.zeros(len(self), dtype=bool)
        for label, name in enumerate(self.classes):
            own = np.flatnonzero(self.labels.numpy() == label)
            count = max(1, round(share * len(own)))
            if count >= len(own):
                raise UserError(
                    f"--val-split {share} leaves no image of {name} to train on: choose less, or add images"
                )
            held[rng.permutation(own)[:count]] = True
        return self.take(np.flatnonzero(~held)), self.take(np.flatnonzero(held))


def open_splits(root: str | os.PathLike, val_split: float | None, seed: int) -> tuple[ClassFolder, ClassFolder]:
    """Training and held-out images: of ROOT/train and ROOT/val or ROOT/test, or a `val_split` of the one folder ROOT.

    Raises UserError where neither is there, or a class lacks in one of them.
    """
    root = Path(root)
    held = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    if val_split is not None:
        if not 0 < val_split < 1:
            raise UserError(f"--val-split {val_split} must be between 0 and 1")
        if (root / "train").is_dir() and held:
            raise UserError(f"--data {root} has {held.name} already: leave --val-split out")
        return ClassFolder(root / "train" if (root / "train").is_dir() else root).split(val_split, seed)
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder")
    if not (root / "train").is_dir() or held is None:
        missing = "train" if not (root / "train").is_dir() else " or ".join(HELD_OUT)
        raise UserError(f"--data {root} has no folder {missing}: make one, or hold images out with --val-split 0.1")
    train, val = ClassFolder(root / "train"), ClassFolder(held)
    for here, there in ((train, val), (val, train)):
        lacking = sorted(set(here.classes) - set(there.classes))
        if lacking:
            raise UserError(
                f"--data {root}: class folder {lacking[0]} of {here.root.name} is missing in {there.root.name}"
            )
    return train, val


def outputs_of(folder: ClassFolder, num_classes: int, names: Sequence[str] | None) -> Tensor:
    """int64: the head's output that each of the folder's classes is.

    By the outputs' names, where they are known. Where they are not, or are ImageNet's, folders named by numbers from 0
    (ImageNet-V2) are these outputs, and folders named by WordNet ids, be it some only (ImageNet-A, -R), those of a head
    with 1000. Any others, where no names are known, are the outputs in sorted order. Raises UserError where nothing
    fits.
    """
    imagenet = names is None or tuple(names) == wordnet_ids() or names[0].lower().startswith("tench")
    candidates = [tuple(names or ())]
    candidates += [tuple(map(str, range(num_classes)))] * imagenet
    candidates += [wordnet_ids()] * (imagenet and num_classes == 1000)
    candidates += [folder.classes] * (not names and len(folder.classes) == num_classes)
    for outputs in candidates:
        if set(folder.classes) <= set(outputs):
            places = {name: i for i, name in enumerate(outputs)}
            return torch.tensor([places[name] for name in folder.classes])
    if names:
        unknown, known = min(set(folder.classes) - set(names)), ", ".join(names[:10])
        known += ", ..." if len(names) > 10 else ""
        raise UserError(f"{folder.root}: class folder {unknown} is none of the head's {num_classes} classes: {known}")
    raise UserError(
        f"{folder.root} has {len(folder.classes)} class folders but the head {num_classes} outputs, whose names are "
        "not known: give data with the head's classes"
    )


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1K's classes, in the order of the outputs of models trained on it."""
    return tuple(files("sparse_fcmae").joinpath("imagenet_wordnet_ids.txt").read_text().split())
