"""The random streams: whatever is drawn follows from a seed, its stream and its place, so a run can be repeated."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are drawn for. The values are part of what makes a resumed run exact: they never change."""

    CROPS = 1  # place: epoch, index of the image
    ORDER = 2  # place: epoch
    MASKS = 3  # place: step
    SPLIT = 4  # which images are held out
    FEW_LABELS = 5  # which images of a class are trained on
    AUGMENTATION = 6  # place: step, first image of the micro-batch
    SURVEY = 7  # which values of an image the statistics are of
    HELD_OUT = 8  # masks of held-out images; place: image, window of it


def numpy_generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """NumPy's generator for a place in a stream."""
    return np.random.default_rng((seed, int(stream), *place))


def torch_seed(seed: int, stream: Stream, *place: int) -> int:
    """A seed for torch's generators, 63 bits, for a place in a stream."""
    return int(np.random.SeedSequence((seed, int(stream), *place)).generate_state(1, np.uint64)[0]) >> 1
