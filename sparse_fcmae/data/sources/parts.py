"""Images that are parts of a source's files: an image comes as often as its file has pages, or room for windows."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import OpenImage, Reading
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

NAMED = 3  # unreadable images that a note names


class Parts:
    """Every image of a source, as often as it has parts.

    count: of an open image, which raises OSError for one that has none. left_out: the names of what can't be opened or
    has none, with the reasons. Raises UserError where this is more than the fraction `max_bad_images`.
    """

    def __init__(
        self, source: ImageSource, reading: Reading, count: Callable[[OpenImage], int], max_bad_images: float
    ) -> None:
        first = replace(reading, page=0)
        # the parts of a file are as large as each other, so that one is enough
        ends = source.ends if isinstance(source, Parts) else np.arange(1, len(source) + 1)
        each = np.diff(ends, prepend=0)
        found, self.left_out = np.zeros(len(ends), np.int64), []
        for number in tqdm(np.flatnonzero(each), desc="sizes", unit="image", leave=False, dynamic_ncols=True):
            index = int(ends[number] - each[number])
            try:
                with source.open(index) as file:
                    found[number] = count(open_image(file, first))
            except Exception as error:  # decoders raise nearly anything on a broken file
                self.left_out.append(f"{source.name(index)}: {one_line(error)}")
        bad, counts = self.left_out, found.repeat(each)
        if len(bad) > max_bad_images * len(ends):
            raise UserError(
                f"{len(bad)} of {len(ends)} images are unreadable, such as {bad[0]}: raise `max_bad_images`, or "
                "remove them"
            )
        if not counts.any():
            raise UserError(f"{source}: none of its {len(ends)} images can be read, such as {bad[0]}")
        self.source = source
        self.ends, self.readable = counts.cumsum(), int((counts > 0).sum())
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + counts.tobytes()).hexdigest()
        self.notes = list(source.notes)
        if bad:
            named = "; ".join(bad[:NAMED]) + ("; ..." if len(bad) > NAMED else "")
            self.notes.append(f"left out, as {len(bad)} of {len(ends)} images can't be read: {named}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __str__(self) -> str:
        return str(self.source)

    def open(self, index: int) -> BinaryIO:
        """The file with the bytes of a part's image."""
        return self.source.open(self.whole(index))

    def name(self, index: int) -> str:
        """The name of a part's image."""
        return self.source.name(self.whole(index))

    def whole(self, index: int) -> int:
        """The image that a part is of."""
        return int(np.searchsorted(self.ends, index, side="right"))
