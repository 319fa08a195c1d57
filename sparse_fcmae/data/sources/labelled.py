"""Images of any source that each belong to a class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.files import fingerprint_of
from sparse_fcmae.runtime.errors import UserError


class Some:
    """Some images of a source. indices: which, in their new order."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, np.array(indices, dtype=np.int64)
        self.fingerprint, self.notes = fingerprint_of(map(self.name, range(len(self)))), list(source.notes)

    def __len__(self) -> int:
        return len(self.indices)

    def __str__(self) -> str:
        return str(self.source)

    def open(self, index: int) -> BinaryIO:
        """An image's bytes."""
        return self.source.open(int(self.indices[index]))

    def name(self, index: int) -> str:
        """An image's name in its source."""
        return self.source.name(int(self.indices[index]))


@dataclass
class Labelled:
    """A source's images with a class for each.

    classes: the names of the classes. labels: int64 [N], for each image an index into `classes`. notes: the source's,
    and what is added to them.
    """

    source: ImageSource
    classes: tuple[str, ...]
    labels: Tensor
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.notes, self.fingerprint = list(self.source.notes), self.source.fingerprint

    @classmethod
    def by_names(cls, source: ImageSource, names: Sequence[str]) -> "Labelled":
        """The images of a source, of each of which the class has a name. The classes are these names, sorted."""
        classes = tuple(sorted(set(names)))
        label_of = {name: label for label, name in enumerate(classes)}
        return cls(source, classes, torch.tensor([label_of[name] for name in names], dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.source)

    def __str__(self) -> str:
        return str(self.source)

    def open(self, index: int) -> BinaryIO:
        """An image's bytes."""
        return self.source.open(index)

    def name(self, index: int) -> str:
        """An image's name in its source."""
        return self.source.name(index)

    def with_classes(self, classes: Sequence[str]) -> "Labelled":
        """The same images with their labels among these classes, of which some may have no images."""
        place = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([place[name] for name in self.classes], dtype=torch.int64)[self.labels]
        return replace(self, classes=tuple(classes), labels=labels)

    def take(self, indices: Sequence[int]) -> "Labelled":
        """These images alone, with the same classes."""
        part = replace(self, source=Some(self.source, indices), labels=self.labels[torch.tensor(list(indices)).long()])
        part.notes = list(self.notes)
        return part

    def counts(self) -> list[int]:
        """The images of each class."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()


@dataclass(frozen=True)
class Rows:
    """Images, of each of which a table or the like says more.

    labels, splits: the name of each image's class and the split that it is in, None where nothing says so. unlabelled:
    what is wrong in that case.
    """

    source: ImageSource
    labels: Sequence[str] | None
    splits: Sequence[str] | None
    unlabelled: str = "no column for the classes: name it by `label_column`"

    def labelled(self, chosen: Sequence[int] | None = None) -> Labelled:
        """Some images, or all, with their classes. Raises UserError where one has none."""
        if self.labels is None:
            raise UserError(f"{self.source}: {self.unlabelled}")
        source = self.source if chosen is None else Some(self.source, chosen)
        names = self.labels if chosen is None else [self.labels[row] for row in chosen]
        if "" in names:
            raise UserError(f"{source}: {source.name(names.index(''))} has no label: give one, or leave it out")
        if strange := next((name for name in names if not name.isprintable()), None):
            raise UserError(f"{source}: the class {strange!r} can't be printed: save the table as UTF-8")
        return Labelled.by_names(source, names)

    def of_split(self, *names: str) -> list[int]:
        """The rows of the first of these splits that there is, or none. Raises UserError for another split's name."""
        if unknown := sorted(set(self.splits or []) - {"train", "val", "test"}):
            raise UserError(f"{self.source}: the split {unknown[0]} is none of train, val and test: rename it")
        for name in names:
            if found := [row for row, split in enumerate(self.splits or []) if split == name]:
                return found
        return []


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


def split_in(name: str) -> str | None:
    """The split that a file's name begins with, as train-000.tar does, or None."""
    match = SPLIT.match(name)
    return split_of(match[1]) if match else None


def split_of(name: str) -> str:
    """The split that a name means: train, val, test, or itself where it is none of these."""
    return SPLITS.get(name.lower(), name)
