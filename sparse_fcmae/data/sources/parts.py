"""Images that are parts of a source's files: an image comes as often as its file has pages, or room for windows."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import OpenImage, Reading
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.derived import Derived
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

NAMED = 3  # unreadable images that a note names


class Parts(Derived):
    """Every image of a source, as often as it has parts.

    count: of an open image, which raises OSError for one that has none. left_out: what can't be opened or has none.
    Raises UserError where this is more than the fraction `max_bad_images`.
    """

    def __init__(
        self, source: ImageSource, reading: Reading, count: Callable[[OpenImage], int], max_bad_images: float
    ) -> None:
        first = replace(reading, page=0)
        # the parts of a file are as large as each other, so that one is enough
        ends = source.ends if isinstance(source, Parts) else np.arange(1, len(source) + 1)
        each = np.diff(ends, prepend=0)
        found, bad = np.zeros(len(ends), np.int64), []
        for number in tqdm(np.flatnonzero(each), desc="sizes", unit="image", leave=False, dynamic_ncols=True):
            index = int(ends[number] - each[number])
            try:
                with source.open(index) as file:
                    found[number] = count(open_image(file, first))
            except Exception as error:  # decoders raise nearly anything on a broken file
                bad.append(BadImage(source.name(index), one_line(error)))
        counts, named = found.repeat(each), [f"{name}: {reason}" for name, reason in bad[:NAMED]]
        if len(bad) > max_bad_images * len(ends):
            raise UserError(
                f"{len(bad)} of {len(ends)} images are unreadable, such as {named[0]}: raise `max_bad_images`, or "
                "remove them"
            )
        if not counts.any():
            raise UserError(f"{source}: none of its {len(ends)} images can be read, such as {named[0]}")
        self.source, self.left_out = source, bad
        self.ends, self.readable = counts.cumsum(), int((counts > 0).sum())
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + counts.tobytes()).hexdigest()
        self.notes = list(source.notes)
        if bad:
            shown = "; ".join([*named, *(["..."] if len(bad) > NAMED else [])])
            self.notes.append(f"left out, as {len(bad)} of {len(ends)} images can't be read: {shown}")

    def describe(self, what: str) -> None:
        """Has a note say how many parts there are, and `what` they are."""
        self.notes.insert(len(self.source.notes), f"{len(self)} {what}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def whole(self, index: int) -> int:
        """The image that a part is of."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def number(self, index: int) -> int:
        """The number of a part in its image, counted from 0."""
        whole = self.whole(index)
        return index - (int(self.ends[whole - 1]) if whole else 0)

    def counts(self) -> np.ndarray:
        """How many parts each image of the source has: int64 [N]."""
        return np.diff(self.ends, prepend=0)


def labelled_parts(images: Labelled, parts: Parts) -> Labelled:
    """The parts of labelled images' source, each with the class of its image."""
    labels = images.labels.repeat_interleave(torch.from_numpy(parts.counts()))
    labelled = Labelled(parts, images.classes, labels)
    labelled.notes = [*images.notes, *parts.notes[len(images.source.notes) :]]
    labelled.left_out = [*images.left_out, *parts.left_out]
    return labelled
