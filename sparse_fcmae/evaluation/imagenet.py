"""ImageNet and its variants: which of a head's outputs a class folder is, and the errors on corrupted images.

ImageNet-V2 names its folders by the outputs' numbers, ImageNet-A and -R have the WordNet ids of some classes, and
ImageNet-C has a folder for each corruption, with a folder of class folders for each severity.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from sparse_fcmae.data.sources.corruptions import SEVERITIES
from sparse_fcmae.runtime.errors import UserError

ALEXNET = {  # its error rates on ImageNet-C, which mCE is relative to (Hendrycks and Dietterich, 2019, section 4)
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
NOT_IN_MCE = ("gaussian_blur", "saturate", "spatter", "speckle_noise")  # ImageNet-C's further corruptions
CORRUPTIONS = (*ALEXNET, *NOT_IN_MCE)


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1K's classes, in the order of the outputs of models trained on it."""
    return tuple(files("sparse_fcmae.evaluation").joinpath("imagenet_wordnet_ids.txt").read_text().split())


def outputs_of(classes: Sequence[str], num_classes: int, names: Sequence[str] | None) -> Tensor:
    """int64: for each class of labelled images the output of the head that it is.

    names: of the head's outputs, None where they are not known. Classes are looked up among these names. Where no names
    are known, or they are ImageNet's, classes may also be the outputs' numbers, counted from 0, or for a head of 1000
    outputs WordNet ids, be it of some outputs only. Other classes, where no names are known, are the outputs in sorted
    order. Raises UserError where none of this fits.
    """
    imagenet = names is None or tuple(names) == wordnet_ids() or names[0].lower().startswith("tench")
    candidates = [tuple(names or ())]
    if imagenet:
        candidates.append(tuple(map(str, range(num_classes))))
    if imagenet and num_classes == 1000:
        candidates.append(wordnet_ids())
    if not names and len(classes) == num_classes:
        candidates.append(tuple(classes))
    for outputs in candidates:
        if set(classes) <= set(outputs):
            output_of = {name: output for output, name in enumerate(outputs)}
            return torch.tensor([output_of[name] for name in classes])
    if names:
        unknown, known = min(set(classes) - set(names)), ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"class {unknown} is none of the head's {num_classes} classes: {known}")
    raise UserError(
        f"`data` has {len(classes)} class folders but the head {num_classes} outputs, whose names are not known: give "
        "data with the head's classes"
    )


def mean_corruption_error(errors: dict[str, dict[str, float]]) -> float | None:
    """mCE: the mean, over ImageNet-C's 15 corruptions, of the error relative to AlexNet's.

    errors: top-1 errors by corruption and severity. None where not all are there.
    """
    if any(len(errors.get(name, ())) < SEVERITIES for name in ALEXNET):
        return None
    return sum(sum(errors[name].values()) / SEVERITIES / ALEXNET[name] for name in ALEXNET) / len(ALEXNET)
