"""Images that are files: what a folder, a list and a pattern of paths have in common."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO


class ImageFiles:
    """Image files in a fixed order.

    place: where they are, for messages. root: the folder that relative paths start from. files: the paths, as they were
    given or found. notes: what the user should know of them, a line each.
    """

    def __init__(self, place: str, root: str | os.PathLike, files: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.place, self.root, self.files, self.notes = place, Path(root), files, list(notes)
        self.fingerprint = fingerprint_of(files)

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        return self.place

    def open(self, index: int) -> BinaryIO:
        """The file with an image's bytes."""
        return (self.root / self.files[index]).open("rb")

    def name(self, index: int) -> str:
        """An image's path as it was given, or as it was found below the folder."""
        return printable(self.files[index])


def fingerprint_of(files: Sequence[str]) -> str:
    """A digest of the files' names."""
    return hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()


def printable(name: str) -> str:
    """A file's name with bytes that are no UTF-8 as escapes."""
    return name.encode(errors="backslashreplace").decode()
