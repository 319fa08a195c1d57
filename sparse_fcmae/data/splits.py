"""Random parts of labelled images: few labels for each class, and images that are held out from training."""

from typing import TypeVar

import numpy as np

from sparse_fcmae.data.sources import LabelledSource
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.streams import Stream, numpy_generator

Source = TypeVar("Source", bound=LabelledSource)


def few_labels(source: Source, per_class: int, seed: int) -> Source:
    """`per_class` random images of every class. Raises UserError where a class has fewer."""
    rng, chosen = numpy_generator(seed, Stream.FEW_LABELS), []
    for label, name in enumerate(source.classes):
        images = np.flatnonzero(source.labels.numpy() == label)
        if len(images) < per_class:
            raise UserError(f"`labels_per_class` {per_class}: {name} has {len(images)} images: choose that or less")
        chosen.extend(rng.permutation(images)[:per_class].tolist())
    return source.take(sorted(chosen))


def hold_out(source: Source, fraction: float, seed: int, of_classes: bool = True) -> tuple[Source, Source]:
    """Training images, and a random `fraction` of each class, at least one image, that is held out from them.

    A class of one image is trained on alone. of_classes: False where labels are no classes, so that a fraction of all
    images is held out. Raises UserError where another class would have no image left to train on, and where no image
    would be held out.
    """
    rng, held_out = numpy_generator(seed, Stream.SPLIT), np.zeros(len(source), dtype=bool)
    groups = [(name, np.flatnonzero(source.labels.numpy() == label)) for label, name in enumerate(source.classes)]
    for name, images in groups if of_classes else [(str(source), np.arange(len(source)))]:
        count = max(1, round(fraction * len(images))) if len(images) > 1 else 0
        if count >= len(images):
            raise UserError(f"`val_split` {fraction} leaves no image of {name} to train on: choose less, or add images")
        held_out[rng.permutation(images)[:count]] = True
    if not held_out.any():
        raise UserError(f"`val_split` {fraction} holds nothing out: no class of {source} has more than one image")
    return source.take(np.flatnonzero(~held_out).tolist()), source.take(np.flatnonzero(held_out).tolist())
