"""Predicted masks put together from their tiles, and pictures of them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.masks import MaskClasses, nearest, read_mask
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.evaluation.pictures import rgb, shown
from sparse_fcmae.evaluation.plots import colours_of, overlaid
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.evaluation.sheet import save_picture, sheet
from sparse_fcmae.evaluation.tiles import Segmented, Tiles, owned, segmented
from sparse_fcmae.model.segmenter import Segmenter

SIDE = 256  # pixels along the longer side of an image of a sheet


def stitched(found: Iterable[Segmented], tiles: Tiles) -> Iterator[tuple[int, np.ndarray]]:
    """Images whose tiles are all there, by their numbers, and the class of each of their pixels, int16 [H, W].

    found: in the order of the tiles. An image that a tile is missing of is left out.
    """
    image, parts = -1, list[Segmented]()
    counts = tiles.counts()
    for tile in found:
        if (of := tiles.whole(tile.number)) != image:
            image, parts = of, []
        parts.append(tile)
        if len(parts) == counts[image]:
            width, height = max(part.box[2] for part in parts), max(part.box[3] for part in parts)
            labels = np.empty((height, width), np.int16)
            for part, own in zip(parts, owned([part.box for part in parts], (width, height)), strict=True):
                (left, top), (x, y, right, bottom) = part.box[:2], own
                labels[y:bottom, x:right] = part.found.numpy()[y - top : bottom - top, x - left : right - left]
            yield image, labels


def picture_of(
    images: ImageSource, index: int, reading: Reading, form: ImageFormat, side: int, enlarged: bool = False
) -> np.ndarray:
    """An image of a source as people look at it, uint8 [H, W, 3], its longer side of at most so many pixels.

    enlarged: of so many pixels even where it has fewer.
    """
    with images.open(index) as file:
        image = open_image(file, reading)
        width, height = image.size
        scale = side / max(image.size) if enlarged else min(1.0, side / max(image.size))
        pixels = image.resized_crop(
            (0, 0, width, height), (max(1, round(scale * height)), max(1, round(scale * width)))
        )
    normalised = form.normalise(pixels[None])
    return rgb(shown(form, normalised, normalised))[0]


def draw_overlays(model: Segmenter, tiles: Tiles, view: EvaluationView, classes: MaskClasses, path: Path) -> None:
    """Writes a PNG of images as they are, with their masks, and with what a model makes of them, a row each.

    tiles: of the images, with their masks. Images that can't be read are left out.
    """
    colours, columns, names = colours_of(len(classes)), {"image": [], "mask": [], "predicted": []}, []
    bad = list[BadImage]()
    for index, labels in stitched(segmented(tiles, range(len(tiles)), view, model, None, bad), tiles):
        picture = picture_of(tiles.source, index, view.reading, view.form, SIDE, enlarged=True)
        with tiles.masks.open(index) as file:
            true = classes.labels(read_mask(file))
        height, width = labels.shape
        for name, values in (("mask", true), ("predicted", labels)):
            small = nearest(values, (0, 0, width, height), picture.shape[:2])
            columns[name].append(_square(overlaid(picture, small, colours)))
        columns["image"].append(_square(picture))
        names.append(tiles.source.name(index))
    if names:
        legend = dict(zip(classes.names, colours, strict=True))
        save_picture(sheet({name: np.stack(tiles) for name, tiles in columns.items()}, names, legend), path)


def _square(picture: np.ndarray) -> np.ndarray:
    """A picture in the upper left of a white square of SIDE."""
    square = np.full((SIDE, SIDE, 3), 255, np.uint8)
    square[: picture.shape[0], : picture.shape[1]] = picture
    return square
