"""Images that a Python program has: a data set of torch's map-style, a list of images or arrays, an array of images."""

import hashlib
import os
from typing import Any, BinaryIO

from torch import Tensor

from sparse_fcmae.data.decoders.arrays import InMemory

PREFIX = "memory://"  # of what stands for such images where a path does else


class MapStyleImages:
    """The images of anything with a length and items.

    data: each item is an image of Pillow's, an array or tensor ([H, W] or three axes, of which the shortest counts
    channels), a path, or a tuple or list that begins with one of these, or a dict that has it as "image". The
    fingerprint is that of the type and length, as nothing else is known without reading all items.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, data: Any) -> None:
        self.data = data
        self.fingerprint = hashlib.sha256(f"{type(data).__name__} {len(data)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.data)

    def __str__(self) -> str:
        return f"{PREFIX}{type(self.data).__name__}"

    def open(self, index: int) -> BinaryIO | InMemory:
        """An item's image, or the file that it names. Raises TypeError for anything else."""
        item = self.data[index]
        if isinstance(item, dict):
            item = item["image"]
        if isinstance(item, tuple | list):
            item = item[0]
        if isinstance(item, str | os.PathLike):
            return open(item, "rb")
        return InMemory(item.numpy(force=True) if isinstance(item, Tensor) else item)

    def name(self, index: int) -> str:
        """The item's number, counted from 0."""
        return f"item {index}"
