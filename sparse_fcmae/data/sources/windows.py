"""The images of a source as windows: a large image comes as often as windows fit into it side by side."""

import hashlib
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.views import check_window
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

NAMED = 3  # unreadable images that a note names


class Windows:
    """Every image of a source, as often as windows of (height, width) pixels fit into its area, but once at least.

    Which part of its image a window shows is up to the view. All images are opened to find out their sizes; those that
    can't be, or are smaller than a window times `least_scale`, are left out and named. Raises UserError where they are
    more than the fraction `max_bad_images`.
    """

    def __init__(
        self,
        source: ImageSource,
        window: tuple[int, int],
        reading: Reading,
        max_bad_images: float,
        least_scale: float = 1.0,
    ) -> None:
        height, width = window
        least = round(least_scale * height), round(least_scale * width)
        self.source, counts, bad = source, np.zeros(len(source), np.int64), []
        for index in tqdm(range(len(source)), desc="sizes", unit="image", leave=False, dynamic_ncols=True):
            try:
                with source.open(index) as file:
                    image_width, image_height = open_image(file, reading).size
                check_window(image_width, image_height, *least)
            except Exception as error:  # decoders raise nearly anything on a broken file
                bad.append(f"{source.name(index)}: {one_line(error)}")
            else:
                counts[index] = max(1, image_width * image_height // (height * width))
        if len(bad) > max_bad_images * len(source):
            raise UserError(
                f"{len(bad)} of {len(source)} images are unreadable, such as {bad[0]}: raise `max_bad_images`, or "
                "remove them"
            )
        self.ends, self.images = counts.cumsum(), len(source)
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + counts.tobytes()).hexdigest()
        readable = int((counts > 0).sum())
        self.notes = [*source.notes, f"{len(self)} windows of {height}x{width} pixels in {readable} images"]
        if bad:
            named = "; ".join(bad[:NAMED]) + ("; ..." if len(bad) > NAMED else "")
            self.notes.append(f"left out, as {len(bad)} of {len(source)} images can't be read: {named}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __str__(self) -> str:
        return str(self.source)

    def open(self, index: int) -> BinaryIO:
        """The file with the bytes of a window's image."""
        return self.source.open(self._image(index))

    def name(self, index: int) -> str:
        """The name of a window's image."""
        return self.source.name(self._image(index))

    def _image(self, index: int) -> int:
        """The image that a window is of."""
        return int(np.searchsorted(self.ends, index, side="right"))
