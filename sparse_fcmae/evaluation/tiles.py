"""A segmentation model run over images: over each as a whole, or over windows that cover it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_fcmae.data.batches import EvaluationImages, make_loader
from sparse_fcmae.data.decoders.image import Box, OpenImage, Reading
from sparse_fcmae.data.decoders.window import Window, covering
from sparse_fcmae.data.masks import IGNORED, MaskClasses, read_mask
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.masked import another_size
from sparse_fcmae.data.sources.windows import Boxes
from sparse_fcmae.data.views import View, check_window
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.model.segmenter import class_map

OVERLAP = 1 / 3  # of neighbouring windows at least, as mmsegmentation's sliding windows have it


class Tile(Window):
    """What a model sees at once of an open image.

    box: of the image. own: the part of that in which this tile's answer counts. mask: of the whole image, [H, W], or
    None where it is not known.
    """

    def __init__(self, image: OpenImage, box: Box, own: Box, mask: np.ndarray | None) -> None:
        super().__init__(image, box)
        self.own, self.mask = own, mask

    def labels(self, classes: MaskClasses) -> np.ndarray:
        """The classes of the tile's pixels, int16 [h, w]; IGNORED where another tile's answer counts."""
        if self.mask.shape[::-1] != self.image.size:
            raise OSError(f"its mask {another_size(self.mask, self.image.size)}")
        (left, top, right, bottom), own = self.box, self.own
        labels = np.full((bottom - top, right - left), IGNORED, np.int16)
        labels[own[1] - top : own[3] - top, own[0] - left : own[2] - left] = classes.labels(
            self.mask[own[1] : own[3], own[0] : own[2]]
        )
        return labels


class Tiles(Boxes):
    """All tiles of the images of a source, image after image.

    masks: of the images, or None. window: (height, width) of windows in the image's own resolution, or None where an
    image is one tile.
    """

    def __init__(
        self, images: ImageSource, masks: ImageSource | None, window: tuple[int, int] | None, reading: Reading
    ) -> None:
        self.masks, self.window = masks, window
        self._mask: tuple[int, np.ndarray] | None = None  # of the image that is open, with its number
        self._owned: tuple[int, list[Box]] | None = None  # the same of what is its tiles' own
        shown = "{}x{}".format(*window) if window else ""
        super().__init__(images, reading, f"tiles {shown}")
        if window:
            self.describe(f"overlapping windows of {shown} pixels cover {self.readable} images")

    def boxes(self, width: int, height: int) -> list[Box]:
        if not self.window:
            return [(0, 0, width, height)]
        check_window(width, height, *self.window)
        return covering(width, height, self.window, OVERLAP)

    def open(self, index: int) -> Tile:
        window, whole = super().open(index), self.whole(index)
        if self._owned is None or self._owned[0] != whole:
            self._owned = whole, owned(self.boxes(*window.image.size), window.image.size)
        return Tile(window.image, window.box, self._owned[1][self.number(index)], self._mask_of(whole))

    def _mask_of(self, whole: int) -> np.ndarray | None:
        """An image's mask, which stays until another one is asked for."""
        if self.masks is None:
            return None
        if self._mask is None or self._mask[0] != whole:
            with self.masks.open(whole) as file:
                self._mask = whole, read_mask(file)
        return self._mask[1]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_mask": None, "_owned": None}


def owned(boxes: Sequence[Box], size: tuple[int, int]) -> list[Box]:
    """The part of each tile that is nearer to its middle than to others'. They tile the image of (width, height).

    boxes: as `covering` gives them.
    """

    def limits(first: int, last: int, side: int) -> dict[int, tuple[int, int]]:
        starts = sorted({box[first] for box in boxes})
        length = boxes[0][last] - boxes[0][first]
        between = [(one + other + length) // 2 for one, other in pairwise(starts)]
        return dict(zip(starts, zip([0, *between], [*between, side], strict=True), strict=True))

    columns, rows = limits(0, 2, size[0]), limits(1, 3, size[1])
    return [(columns[left][0], rows[top][0], columns[left][1], rows[top][1]) for left, top, _, _ in boxes]


@dataclass(frozen=True)
class TileView(View):
    """The pixels of a tile in the model's size and, where `classes` are given, the labels of its own pixels."""

    classes: MaskClasses | None = None

    def __call__(self, tile: Tile) -> Tensor | tuple[Tensor, Tensor]:
        width, height = tile.size
        pixels = tile.resized_crop((0, 0, width, height), self.size)
        return (pixels, torch.from_numpy(tile.labels(self.classes))) if self.classes else pixels


class Segmented(NamedTuple):
    """What a model says of a tile. found: the class of each pixel, int16 [h, w]. labels: of the pixels, where known."""

    number: int
    box: Box
    found: Tensor
    labels: Tensor | None


@torch.no_grad()
def segmented(
    tiles: Tiles,
    numbers: Sequence[int],
    view: EvaluationView,
    logits: Callable[[Tensor], Tensor],
    classes: MaskClasses | None,
    bad: list[BadImage],
    description: str | None = None,
) -> Iterator[Segmented]:
    """What a model says of tiles, in their order.

    numbers: of the tiles. logits: of normalised images [B, C, h, w], [B, K, h, w]. classes: to have labels by. bad:
    gets the tiles that can't be read, which are left out.
    """
    batches = [list(numbers[start : start + view.batch_size]) for start in range(0, len(numbers), view.batch_size)]
    dataset = EvaluationImages(tiles, TileView(view.size, view.reading, classes))
    loader = make_loader(dataset, batches, view.num_workers, pin_memory=view.device.type == "cuda")
    bar = tqdm(total=len(numbers), desc=description, unit="tile", disable=not description, dynamic_ncols=True)
    with bar, loader.explained():
        for batch in loader if batches else ():
            bad += batch.bad
            if len(batch.pixels):
                normalised = view.form.normalise(batch.pixels.to(view.device, non_blocking=True))
                with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
                    answers = logits(normalised).float()
                for row, (number, box) in enumerate(zip(batch.index.tolist(), batch.boxes.tolist(), strict=True)):
                    left, top, right, bottom = box
                    labels = batch.labels[row] if batch.labels else None
                    found = class_map(answers[row], bottom - top, right - left).cpu()
                    yield Segmented(number, tuple(box), found, labels)
            bar.update(len(batch.pixels) + len(batch.bad))
