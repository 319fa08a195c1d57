"""Several sources one after the other."""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import BinaryIO

import numpy as np

from sparse_fcmae.data.sources import ImageSource


class Several:
    """The images of several sources, in their order."""

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self.parts, self.ends = list(parts), np.array(list(accumulate(map(len, parts))))
        self.fingerprint = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest()
        self.notes = [f"{part}: {note}" for part in parts for note in part.notes]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts))

    def open(self, index: int) -> BinaryIO:
        """An image's bytes."""
        part, place = self._place(index)
        return part.open(place)

    def name(self, index: int) -> str:
        """The source and the image's name in it."""
        part, place = self._place(index)
        return f"{part}: {part.name(place)}"

    def version(self) -> str | None:
        """Those of all sources, where each has one."""
        versions = [part.version() for part in self.parts]
        return None if None in versions else "\n".join(versions)

    def _place(self, index: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[number], index - (int(self.ends[number - 1]) if number else 0)
