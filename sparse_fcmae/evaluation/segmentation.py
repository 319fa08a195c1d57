"""How well masks are predicted: intersection over union of each class, counted over the pixels of all images."""

from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.data.masks import MaskClasses
from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.data.sources.masked import MaskedImages, open_masked_held_out, open_masked_splits, survey_masks
from sparse_fcmae.evaluation.config import EvaluateConfig
from sparse_fcmae.evaluation.run import EvaluationView, view_of
from sparse_fcmae.evaluation.samples import warn_of_another_split
from sparse_fcmae.evaluation.tiles import Tiles, segmented
from sparse_fcmae.model.segmenter import Segmenter
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import check_unused
from sparse_fcmae.weights.segmenter import read_segmenter

NAMED = 10  # classes that a line names


def confusion(labels: Tensor, found: Tensor, classes: int) -> Tensor:
    """How many pixels of each class were taken for each: int64 [true, predicted]. labels, found: of the same shape.

    Pixels whose label is negative do not count.
    """
    counted = labels >= 0
    return (labels[counted].long() * classes + found[counted]).bincount(minlength=classes**2).view(classes, classes)


def scores(counts: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """miou, pixel_accuracy, mean_accuracy and by_class, fractions, of counts [true, predicted].

    The means are over the classes that are there: for miou in a mask or in a prediction, for mean_accuracy in a mask.
    """
    right, true = counts.diagonal().double(), counts.sum(1).double()
    union = true + counts.sum(0) - right
    iou, there = right / union, union > 0
    return {
        "miou": iou[there].mean().item(),
        "pixel_accuracy": (right.sum() / true.sum()).item(),
        "mean_accuracy": (right / true)[true > 0].mean().item(),
        "iou_by_class": {name: iou[i].item() for i, name in enumerate(names) if there[i]},
    }


def measure_tiles(
    model: Segmenter,
    tiles: Tiles,
    numbers: range,
    view: EvaluationView,
    classes: MaskClasses,
    description: str | None = None,
) -> tuple[Tensor, list[BadImage]]:
    """The confusion of a model over some tiles, int64 [true, predicted], and the tiles that can't be read."""
    counts, bad = torch.zeros(len(classes), len(classes), dtype=torch.int64), list[BadImage]()
    for tile in segmented(tiles, numbers, view, model, classes, bad, description):
        counts += confusion(tile.labels, tile.found, len(classes))
    return counts, bad


def evaluate_segmenter(config: EvaluateConfig) -> dict[str, Any]:
    """What `evaluate` measures of a segmentation model: its scores on held-out images, or on all where none are."""
    unused = ("labels_per_class", "per_image", "crop_fraction", "ignore", "class_names")
    check_unused(config, unused, "is not for a segmentation model, which has its own or none: leave it out")
    weights = read_segmenter(config.init)
    view = view_of(config, weights.encoder)
    warn_of_another_split(config)
    if config.val_split is None:
        images, split = open_masked_held_out(config.data, config), {}
    else:
        _, images = open_masked_splits(config.data, config, config.val_split, config.seed)
        split = {"val_split": config.val_split, "seed": config.seed}
    if view.reading.pages == "images":
        raise UserError("`pages=images`: pages can't be paired with masks, so save them as files")
    classes = weights.classes
    notes = said_of(images, view, classes)
    tiles = Tiles(images.source, images.masks, view.size if view.native else None, view.reading)
    print("\n".join([*dict.fromkeys([*tiles.notes, *notes])]), flush=True)
    model = weights.model(config.backend).to(view.device)
    counts, bad = measure_tiles(model, tiles, range(len(tiles)), view, classes, "evaluating")
    bad = [*tiles.left_out, *bad]
    if not counts.any():
        reason = f"{bad[0].name}: {bad[0].reason}" if bad else "all pixels are ignored"
        raise UserError(f"no pixel of {images} can be judged: {reason}")
    return {
        "data": config.data,
        **split,
        "images": len(images) - len({image.name for image in bad}),
        "unreadable": sorted({image.name for image in bad}),
        **scores(counts, classes.names),
        "confusion": {"classes": list(classes.names), "counts": counts.tolist()},
    }


def said_of(images: MaskedImages, view: EvaluationView, classes: MaskClasses) -> list[str]:
    """What there is to say about masks: how much is ignored, and which classes are in none, a line each.

    Raises UserError where masks have a value that is none of the classes', or another size than their images.
    """
    pixels = survey_masks(images, view.reading)
    if unknown := sorted(set(pixels) - {*classes.values, *classes.ignored}):
        raise UserError(
            f"{images}: masks have the value {unknown[0]}, which is none of the model's classes "
            f"({', '.join(map(str, classes.values[:10]))}{', ...' if len(classes) > 10 else ''}): put them right"
        )
    lines = []
    if ignored := sum(pixels[value] for value in classes.ignored):
        lines.append(f"{100 * ignored / pixels.total():.2g} % of the pixels are ignored, as the model was trained")
    if absent := [name for name, value in zip(classes.names, classes.values, strict=True) if not pixels[value]]:
        more = f", and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        lines.append(f"in no mask: {', '.join(absent[:NAMED])}{more}")
    return lines
