"""Images that are parts of a source's files: an image comes as often as its file has pages, or room for windows."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import OpenImage, Reading
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.derived import Derived
from sparse_fcmae.data.sources.index_cache import Index, remembered
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

NAMED = 3  # unreadable images that a note names
SLOW = 2.0  # seconds from which on a count is worth keeping


class Parts(Derived):
    """Every image of a source, as often as it has parts.

    what: what the parts are, for their count to be kept by. count: of an open image, which raises OSError for one that
    has none. left_out: what can't be opened or has none. All images are opened to count their parts. Where that takes
    long it is kept in the user's cache until an image changes. Raises UserError where more than the fraction
    `max_bad_images` is left out, or all; None for never.
    """

    def __init__(
        self,
        source: ImageSource,
        reading: Reading,
        what: str,
        count: Callable[[OpenImage], int],
        max_bad_images: float | None,
    ) -> None:
        # the parts of a file are as large as each other, so that one is enough
        each = source.counts() if isinstance(source, Parts) else np.ones(len(source), np.int64)
        found, bad, kept = _counted(source, each, replace(reading, page=0), what, count)
        counts, named = found.repeat(each), [f"{name}: {reason}" for name, reason in bad[:NAMED]]
        if max_bad_images is not None and len(bad) > max_bad_images * len(each):
            raise UserError(
                f"{len(bad)} of {len(each)} images are unreadable, such as {named[0]}: raise `max_bad_images`, or "
                "remove them"
            )
        if max_bad_images is not None and not counts.any():
            raise UserError(f"{source}: none of its {len(each)} images can be read, such as {named[0]}")
        self.source, self.left_out = source, bad
        self.ends, self.readable = counts.cumsum(), int((counts > 0).sum())
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + counts.tobytes()).hexdigest()
        self.notes = [*source.notes, *kept]
        if bad:
            shown = "; ".join([*named, *(["..."] if len(bad) > NAMED else [])])
            self.notes.append(f"left out, as {len(bad)} of {len(each)} images can't be read: {shown}")

    def describe(self, what: str) -> None:
        """Has a note say how many parts there are, and `what` they are."""
        self.notes.insert(len(self.source.notes), f"{len(self)} {what}")

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

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


def _counted(
    source: ImageSource, each: np.ndarray, reading: Reading, what: str, count: Callable[[OpenImage], int]
) -> tuple[np.ndarray, list[BadImage], list[str]]:
    """The number of parts of images, int64 [N], those that can't be opened or have none, and what there is to say.

    each: of how many images in a row of the source one is opened for all.
    """
    firsts, began = each.cumsum() - each, time.monotonic()
    bad: list[BadImage] = []

    def look_at(numbers: np.ndarray, found: np.ndarray) -> Index:
        for number in tqdm(numbers, desc="sizes", unit="image", delay=2, leave=False):
            index = int(firsts[number])
            try:
                with source.open(index) as file:
                    found[number] = count(open_image(file, reading))
            except Exception as error:  # decoders raise nearly anything on a broken file
                bad.append(BadImage(source.name(index), one_line(error)))
        return {"found": found}

    def all_of_them() -> Index:
        return look_at(np.flatnonzero(each), np.zeros(len(each), np.int64))

    version = source.version()
    if version is None:
        return all_of_them()["found"], bad, []
    key = f"{what} {reading.pages} {reading.max_megapixels} {source.fingerprint} {version}"
    index, notes = remembered("parts", key, all_of_them, worth=lambda index: time.monotonic() - began > SLOW)
    if not bad:  # an earlier call has looked: what it could not read may have lacked a library, or a server
        look_at(np.flatnonzero((index["found"] == 0) & (each > 0)), index["found"])
    return index["found"], bad, notes


def labelled_parts(images: Labelled, parts: Parts) -> Labelled:
    """The parts of labelled images' source, each with the class of its image."""
    labels = images.labels.repeat_interleave(torch.from_numpy(parts.counts()))
    labelled = Labelled(parts, images.classes, labels)
    labelled.notes = [*images.notes, *parts.notes[len(images.source.notes) :]]
    labelled.left_out = [*images.left_out, *parts.left_out]
    return labelled
