"""The images about which a classifier is wrong and most certain: which they are, and a picture of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.pictures import rgb, shown
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.evaluation.sheet import captioned

MOST = 24  # that a picture shows


class Answers(NamedTuple):
    """What a classifier says of N images.

    ranked: int64 [N, k], the classes that are most probable, the first one first. probabilities: float32 [N], of the
    first. index: int64 [N], of the images in their source.
    """

    ranked: Tensor
    probabilities: Tensor
    index: Tensor

    @classmethod
    def of(cls, logits: Tensor, index: Tensor, most: int) -> "Answers":
        """Those that logits [N, K] give. most: how many classes are ranked."""
        ranked = logits.topk(min(most, logits.shape[1]), dim=1).indices
        return cls(ranked, logits.float().softmax(1).amax(1), index)


def worst(answers: Answers, labels: Tensor) -> list[int]:
    """The numbers of up to MOST answers that are wrong, the most certain first. labels: int64 [N]."""
    wrong = torch.nonzero(answers.ranked[:, 0] != labels)[:, 0]
    return wrong[answers.probabilities[wrong].argsort(descending=True, stable=True)][:MOST].tolist()


def draw_mistakes(
    answers: Answers, labels: Tensor, classes: Sequence[str], source: ImageSource, view: EvaluationView
) -> Image.Image | None:
    """A picture of the worst answers, None where there are none.

    source: the images that `index` counts. classes: the names of outputs. An image of windows is shown by its middle.
    """
    pixels, captions = [], []
    middle = CentreView(view.size, view.reading, view.crop_fraction, native=view.native)
    for number in worst(answers, labels):
        said = f"{classes[answers.ranked[number, 0]]} {100 * answers.probabilities[number]:.0f} %"
        captions.append((f"is {classes[labels[number]]}", f"said {said}"))
        try:
            with source.open(int(answers.index[number])) as file:
                pixels.append(middle(file))
        except Exception:  # it was readable a moment ago, and what was measured is not to be lost for its picture
            captions[-1] = (*captions[-1][:1], "can't be read any more")
            pixels.append(torch.zeros(*view.size, view.form.in_chans, dtype=getattr(torch, view.reading.dtype)))
    if not pixels:
        return None
    images = view.form.normalise(torch.stack(pixels))
    return captioned(rgb(shown(view.form, images, images)), captions)
