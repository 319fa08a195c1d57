"""Image files that each belong to a class."""

import copy
import os
from collections.abc import Iterable, Sequence

import torch

from sparse_fcmae.data.sources.files import ImageFiles, Paths, fingerprint_of


class LabelledFiles(ImageFiles):
    """Image files with the name of a class for each.

    place, root, files, notes: as in `ImageFiles`. names: of each file's class. classes: int64 labels are indices into
    these, the names in order.
    """

    def __init__(
        self, place: str, root: str | os.PathLike, files: Iterable[str], names: Sequence[str], notes: Sequence[str] = ()
    ) -> None:
        super().__init__(place, root, files, notes)
        self.classes = tuple(sorted(set(names)))
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = torch.tensor([label_of[name] for name in names], dtype=torch.int64)

    def with_classes(self, classes: Sequence[str]) -> "LabelledFiles":
        """The same images with their labels among these classes, of which some may have no images."""
        other, place = copy.copy(self), {name: label for label, name in enumerate(classes)}
        other.classes = tuple(classes)
        other.labels = torch.tensor([place[name] for name in self.classes], dtype=torch.int64)[self.labels]
        return other

    def take(self, indices: Sequence[int]) -> "LabelledFiles":
        """These images alone, with the same classes."""
        part = copy.copy(self)
        part.files = Paths(self.files[i] for i in indices)
        part.labels = self.labels[torch.tensor(list(indices), dtype=torch.int64)]
        part.fingerprint, part.notes = fingerprint_of(part.files), list(self.notes)
        return part

    def counts(self) -> list[int]:
        """The images of each class."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()
