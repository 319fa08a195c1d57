"""Images that are files: what a folder, a list and a pattern of paths have in common."""

import hashlib
import io
import os
import stat
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparse_fcmae.data.decoders.ome_zarr import ZarrFolder
from sparse_fcmae.data.sources.addresses import Pieces, is_address

NOT_WAITING = getattr(os, "O_NONBLOCK", 0)


class Paths(Sequence[str]):
    """Many paths in little memory: the bytes of all of them in a row, and where each ends.

    A list of strings takes 140 bytes a path in each process that loads images, as Python counts references in the
    strings themselves and a forked process then no longer shares their memory. This takes 8 bytes beside the path's
    own, which all processes share.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += path.encode(errors="surrogateescape")
            ends.append(len(text))
        self.text, self.ends = np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64)

    @classmethod
    def of_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "Paths":
        """Paths of their bytes, uint8, and of where each ends, int64 with a 0 in front."""
        paths = cls(())
        paths.text, paths.ends = text, ends
        return paths

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        place = range(len(self))[index]  # raises IndexError, and counts negative ones from the end
        return self.text[self.ends[place] : self.ends[place + 1]].tobytes().decode(errors="surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


USUAL_PIECES = Pieces()


def leads_somewhere(root: Path, files: Iterable[str]) -> bool:
    """Whether any of these paths leads to a file or Zarr folder; of an address that is taken for granted."""
    return any(is_address(file) or (root / file).exists() for file in files)


class ImageFiles:
    """Image files in a fixed order.

    place: where they are, for messages. root: the folder that relative paths start from. files: the paths, as they were
    given or found, of which a copy is kept; addresses are files too. notes: what the user should know of them, a line
    each. pieces: what reads behind addresses. fingerprint: as `fingerprint_of` gives it, where it is known.
    """

    def __init__(
        self,
        place: str,
        root: str | os.PathLike,
        files: Iterable[str],
        notes: Sequence[str] = (),
        pieces: Pieces = USUAL_PIECES,
        fingerprint: str | None = None,
    ) -> None:
        self.place, self.root, self.notes, self.pieces = place, Path(root), list(notes), pieces
        self.files = files if isinstance(files, Paths) else Paths(files)
        self.fingerprint = fingerprint or fingerprint_of(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        return self.place

    def open(self, index: int) -> BinaryIO:
        """The file with an image's bytes, or its Zarr folder."""
        file = self.files[index]
        if is_address(file):
            return io.BytesIO(self.pieces.read(file))
        return open_file(self.root / file)

    def name(self, index: int) -> str:
        """An image's path as it was given, or as it was found below the folder."""
        return printable(self.files[index])

    def version(self) -> str | None:
        """As `version_of` has it; None where there are addresses."""
        return version_of(self.root, self.files)


def open_file(path: Path) -> BinaryIO | ZarrFolder:
    """A file, or a Zarr folder. Raises OSError for anything else, such as a pipe, which would keep one waiting."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | NOT_WAITING))  # noqa: SIM115
    except IsADirectoryError:
        return ZarrFolder(path)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("is no regular file")
    return file


def fingerprint_of(files: Iterable[str]) -> str:
    """A digest of the files' names, as lines of a text."""
    digest, between = hashlib.sha256(), b""
    for file in files:
        digest.update(between + file.encode(errors="surrogateescape"))
        between = b"\n"
    return digest.hexdigest()


def version_of(root: Path, files: Iterable[str]) -> str | None:
    """A digest of where files are, and of their sizes and times of change, in a Zarr folder of all that is in it.

    files: paths that relative ones start at `root`. None where there are addresses.
    """
    found = array("q")
    for file in files:
        if is_address(file):
            return None
        path = root / file
        try:
            status = os.stat(path)
        except OSError:
            found.extend((-1, -1))
            continue
        parts = [status]
        if stat.S_ISDIR(status.st_mode):
            parts += [os.stat(os.path.join(at, name)) for at, _, names in os.walk(path) for name in sorted(names)]
        found.extend(number for part in parts for number in (part.st_size, part.st_mtime_ns))
    return hashlib.sha256(os.path.abspath(root).encode(errors="surrogateescape") + found.tobytes()).hexdigest()


def printable(name: str) -> str:
    """A file's name with bytes that are no UTF-8, line ends and what else would move a terminal as escapes."""
    text = name.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
