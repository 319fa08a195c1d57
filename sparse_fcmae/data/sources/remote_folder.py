"""Images below a folder's address, such as s3://bucket/scans, or whose addresses match a pattern."""

import hashlib
import io
from typing import BinaryIO

import numpy as np

from sparse_fcmae.data.sources.addresses import Pieces, listed
from sparse_fcmae.data.sources.files import ImageFiles
from sparse_fcmae.data.sources.folder import images_among
from sparse_fcmae.data.sources.labelled import SPLITS, Rows, split_of
from sparse_fcmae.runtime.errors import UserError


class RemoteFolder(ImageFiles):
    """The image files below an address, at any depth, sorted, or those that match it where it has a `*`.

    files: their paths below the folder, or below the one in front of the first `*`. pieces: what fetches and keeps
    them. Hidden files and folders are left out. Raises UserError where they can't be listed, and where there is none.
    """

    def __init__(self, address: str, pieces: Pieces) -> None:
        self.root_address, found = listed(address)
        found = {p: known for p, known in found.items() if not any(part.startswith(".") for part in p.split("/"))}
        files, notes = images_among(sorted(found))
        if not files:
            there = f" ({notes[0]})" if notes else ""
            raise UserError(f"{address}: no image files there{there}")
        super().__init__(address, "", files, notes, pieces)
        self.sizes = np.array([found[file][0] for file in files], np.int64)
        self.versions = np.array([found[file][1] for file in files], np.bytes_)

    def open(self, index: int) -> BinaryIO:
        """An image's bytes."""
        size, version = int(self.sizes[index]), self.versions[index].decode()
        address = f"{self.root_address}/{self.files[index]}"
        return io.BytesIO(self.pieces.read(address, version, size=size if size > 0 else None))

    def version(self) -> str | None:
        """A digest of the files' sizes and versions, where the server tells all of these."""
        known = bool((self.sizes > 0).all() and (self.versions != b"").all())
        place = self.root_address.encode()
        return hashlib.sha256(place + self.sizes.tobytes() + self.versions.tobytes()).hexdigest() if known else None

    def rows(self) -> Rows:
        """The images with the classes and splits that their folders name, as in train/cat/1.jpg or cat/1.jpg."""
        parts = [file.split("/") for file in self.files]
        splits = None
        if any(len(path) > 1 and path[0].lower() in SPLITS for path in parts):  # others are left out of both
            splits = [split_of(path[0]) if len(path) > 1 else "no folder" for path in parts]
            parts = [path[1:] if len(path) > 1 else ["", ""] for path in parts]
        labels = [path[0] for path in parts] if all(len(path) > 1 for path in parts) else None
        unlabelled = "some images lie in no class folder: make a folder for each class"
        return Rows(self, labels, splits, unlabelled, strict=False)
