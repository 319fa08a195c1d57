"""Images of any source that each belong to a class."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.derived import Annotated, Derived
from sparse_fcmae.data.sources.files import ImageFiles, fingerprint_of
from sparse_fcmae.runtime.errors import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)


class Some(Derived):
    """Some images of a source. indices: which, in their new order."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices, self.notes = source, np.array(indices, dtype=np.int64), list(source.notes)

    @cached_property
    def fingerprint(self) -> str:
        """Of files the digest of their names, as of a folder that holds these alone."""
        if isinstance(self.source, ImageFiles):
            return fingerprint_of(self.source.files[index] for index in self.indices)
        return hashlib.sha256(self.source.fingerprint.encode() + self.indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def whole(self, index: int) -> int:
        """The number of an image in the source."""
        return int(self.indices[index])


@dataclass
class Labelled(Annotated):
    """A source's images with a class for each.

    classes: the names of the classes. labels: int64 [N], for each image an index into `classes`. labels_in_names:
    whether an image's name says its class, as its path does in class folders, so that the fingerprint need not. notes:
    the source's, and what is added to them. left_out: images of which nothing can be read.
    """

    source: ImageSource
    classes: tuple[str, ...]
    labels: Tensor
    labels_in_names: bool = False
    notes: list[str] = field(init=False)
    left_out: list[BadImage] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.notes = list(self.source.notes)

    @cached_property
    def fingerprint(self) -> str:
        """The source's, and that of the labels where the names do not say them."""
        if self.labels_in_names:
            return self.source.fingerprint
        names = "\n".join([self.source.fingerprint, *(self.classes[label] for label in self.labels.tolist())])
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()

    @classmethod
    def by_names(cls, source: ImageSource, names: Sequence[str], labels_in_names: bool = False) -> "Labelled":
        """The images of a source, of each of which the class has a name. The classes are these names, sorted."""
        classes = tuple(sorted(set(names)))
        label_of = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([label_of[name] for name in names], dtype=torch.int64)
        return cls(source, classes, labels, labels_in_names)

    def with_classes(self, classes: Sequence[str]) -> "Labelled":
        """The same images with their labels among these classes, of which some may have no images."""
        place = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([place[name] for name in self.classes], dtype=torch.int64)[self.labels]
        other = replace(self, classes=tuple(classes), labels=labels)
        other.notes, other.left_out = list(self.notes), list(self.left_out)
        return other

    def take(self, indices: Sequence[int]) -> "Labelled":
        """These images alone, with the same classes."""
        part = replace(self, source=Some(self.source, indices), labels=self.labels[torch.tensor(list(indices)).long()])
        part.notes, part.left_out = list(self.notes), list(self.left_out)
        return part

    def counts(self) -> list[int]:
        """The images of each class."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()


@dataclass(frozen=True)
class Rows:
    """Images, of each of which a table or the like says more.

    labels, splits: the name of each image's class and the split that it is in, None where nothing says so. unlabelled:
    what is wrong without labels. strict: whether each split has to be train, val or test; otherwise others are left
    out, and named in the notes.
    """

    source: ImageSource
    labels: Sequence[str] | None
    splits: Sequence[str] | None
    unlabelled: str = "no column for the classes: name it by `label_column`"
    strict: bool = True

    def labelled(self, chosen: Sequence[int] | None = None, of_classes: bool = True) -> Labelled:
        """Some images, or all, with their classes. Raises UserError where one has none.

        of_classes: False where a label need not be one class, and may be empty.
        """
        if self.labels is None:
            raise UserError(f"{self.source}: {self.unlabelled}")
        source = self.source if chosen is None else Some(self.source, chosen)
        names = self.labels if chosen is None else [self.labels[row] for row in chosen]
        if of_classes and "" in names:
            raise UserError(f"{source}: {source.name(names.index(''))} has no label: give one, or leave it out")
        if strange := next((name for name in names if not name.isprintable()), None):
            raise UserError(f"{source}: the class {strange!r} can't be printed: save the table as UTF-8")
        labelled = Labelled.by_names(source, names)
        labelled.notes += self.notes()
        return labelled

    def notes(self) -> list[str]:
        """A line about the images that are in none of train, val and test, where these are left out."""
        if not (others := {} if self.strict else self._others()):
            return []
        counts = ", ".join(f"{count} of {split}" for split, count in others.items())
        return [f"left out, as these are in none of train, val and test: {counts}"]

    def _others(self) -> dict[str, int]:
        """How many images are in each split that is none of train, val and test."""
        return {s: n for s, n in sorted(Counter(self.splits or []).items()) if s not in ("train", "val", "test")}

    def of_split(self, *names: str) -> list[int]:
        """The rows of the first of these splits that there is, or none. Raises UserError for another split's name."""
        if self.strict and (unknown := next(iter(self._others()), None)):
            raise UserError(f"{self.source}: the split {unknown} is none of train, val and test: rename it")
        for name in names:
            if found := [row for row, split in enumerate(self.splits or []) if split == name]:
                return found
        return []


def splits_in(paths: Sequence[str]) -> list[str] | None:
    """The splits that files' names begin with, as train-000.tar does, of another name itself; None where none does."""
    names = [os.path.basename(path) for path in paths]
    found = [SPLIT.match(name) for name in names]
    if not any(found):
        return None
    return [split_of(match[1]) if match else name for match, name in zip(found, names, strict=True)]


def split_of(name: str) -> str:
    """The split that a name means: train, val, test, or itself where it is none of these."""
    return SPLITS.get(name.lower(), name)
