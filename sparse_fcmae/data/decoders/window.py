"""A window of an image as an image of its own."""

import math

from torch import Tensor

from sparse_fcmae.data.decoders.image import Box, OpenImage


class Window(OpenImage):
    """The pixels of an open image in a box. Others may be looking at the same image, so it stays open."""

    def __init__(self, image: OpenImage, box: Box) -> None:
        self.image, self.box = image, box
        left, top, right, bottom = box
        self.size, self.dtype, self.in_chans = (right - left, bottom - top), image.dtype, image.in_chans
        self.is_photograph = image.is_photograph

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def resized_crop(self, box: Box, size: tuple[int, int]) -> Tensor:
        x, y = self.box[:2]
        left, top, right, bottom = box
        return self.image.resized_crop((left + x, top + y, right + x, bottom + y), size)

    def decode_all(self) -> None:
        width, height = self.size
        self.resized_crop((0, 0, width, height), (height, width))


def covering(width: int, height: int, window: tuple[int, int], overlap: float = 0.0) -> list[Box]:
    """The boxes of as few windows of (height, width) pixels as cover an image, row by row, evenly spread.

    They overlap where the image's sides are no multiples of theirs, and by a fraction of their sides at least. There
    are none where the image is smaller.
    """
    rows, columns = (_starts(side, length, overlap) for side, length in zip((height, width), window, strict=True))
    return [(left, top, left + window[1], top + window[0]) for top in rows for left in columns]


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """Where the windows along a side begin."""
    if side < window:
        return []
    last = math.ceil((side - window) / max(1, math.floor(window * (1 - overlap))))
    return [round(number * (side - window) / last) if last else 0 for number in range(last + 1)]
