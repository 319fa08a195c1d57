"""Images that a Python program has: a data set of torch's map-style, a list of images or arrays, an array of images."""

import hashlib
import os
from typing import Any, BinaryIO

from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor

from sparse_fcmae.data.decoders.arrays import InMemory
from sparse_fcmae.data.sources.files import ImageFiles
from sparse_fcmae.runtime.errors import UserError

PREFIX = "memory://"  # of what stands for such images where a path does else


class MapStyleImages:
    """The images of anything with a length and items.

    data: each item is an image of Pillow's, an array or tensor ([H, W] or three axes, of which the shortest counts
    channels), a path, or a tuple or list that begins with one of these, or a dict that has it as "image". The
    fingerprint is that of the type and length, as nothing else is known without reading all items. Raises UserError
    for what has no length or items, and where there are none.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, data: Any) -> None:
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise UserError(f"`data` is a {type(data).__name__}: give a path, or what has a length and items")
        if not len(data):
            raise UserError(f"`data` is an empty {type(data).__name__}")
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
        if isinstance(item, ImageFile) and item.filename:  # which processes and views would read at the same time
            item = item.filename
        if isinstance(item, str | os.PathLike):
            return ImageFiles("", "", [os.fspath(item)]).open(0)
        if getattr(item, "is_animated", False):
            raise OSError(f"has {item.n_frames} frames: give each as an image of its own")
        if isinstance(item, Image.Image):
            item = item.copy()  # as an image that is read may be turned and reduced
        return InMemory(item.numpy(force=True) if isinstance(item, Tensor) else item)

    def name(self, index: int) -> str:
        """The item's number, counted from 0."""
        return f"item {index}"

    def version(self) -> None:
        """Nothing is known of when items change."""
