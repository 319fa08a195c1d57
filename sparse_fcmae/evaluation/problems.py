"""What the outputs of a classifier's head mean where images have no single class: several labels each, or a number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.evaluation.run import EvaluationSet, check_any, run_model, together
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError

BETWEEN = ";"  # the labels of an image


class Problem(ABC):
    """Targets made of the texts of images' labels, a loss, and what is measured.

    measures: the names of what `scores` gives.
    """

    measures: ClassVar[tuple[str, ...]]

    @abstractmethod
    def outputs_of(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The names of the outputs that these labels need, an image's label each."""

    @abstractmethod
    def target(self, text: str, outputs: tuple[str, ...]) -> list[float]:
        """What the outputs are to be for a label. Raises UserError for one that can't be."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of logits and targets, float [B, K] both."""

    @abstractmethod
    def scores(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """What is measured of logits and targets, float [N, K] both."""

    def by_output(self, logits: Tensor, targets: Tensor, outputs: Sequence[str]) -> dict[str, dict[str, float]]:
        """What is measured of each output by itself, by its name; nothing where a task does not say."""
        return {}

    def targets(self, images: Labelled, outputs: tuple[str, ...]) -> Tensor:
        """The target of each image: float32 [N, K]."""
        each = []
        for label, text in enumerate(images.classes):
            try:
                each.append(self.target(text, outputs))
            except ValueError as error:
                first = (images.labels == label).nonzero()
                raise UserError(f"{images}: {images.name(int(first[0])) if len(first) else ''}: {error}") from None
        return torch.tensor(each, dtype=torch.float32).reshape(-1, len(outputs))[images.labels]


class SeveralLabels(Problem):
    """Each image has any number of labels, with BETWEEN between them, and each output is the logit of one."""

    measures = ("mean_average_precision", "f1", "loss")

    def outputs_of(self, texts: Sequence[str]) -> tuple[str, ...]:
        names = tuple(sorted({name for text in texts for name in parts(text)}))
        if not names:
            raise UserError("no image has a label")
        return names

    def target(self, text: str, outputs: tuple[str, ...]) -> list[float]:
        if unknown := sorted(set(parts(text)) - set(outputs)):
            raise ValueError(f"the label {unknown[0]} is none of those that are trained: {', '.join(outputs[:10])}")
        return [float(name in parts(text)) for name in outputs]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets)

    def scores(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """The mean over labels that an image has of `average_precision`, and F1 over all labels of all images.

        For F1 an image has the labels whose probability is more than one half.
        """
        true, found = targets > 0.5, logits > 0
        precisions = self._average_precisions(logits, true).values()
        both = 2 * (true & found).sum().item()
        return {
            "mean_average_precision": sum(precisions) / max(1, len(precisions)),
            "f1": both / max(1, true.sum().item() + found.sum().item()),
            "loss": self.loss(logits.double(), targets.double()).item(),
        }

    def by_output(self, logits: Tensor, targets: Tensor, outputs: Sequence[str]) -> dict[str, dict[str, float]]:
        precisions = self._average_precisions(logits, targets > 0.5)
        return {"average_precision_by_label": {outputs[label]: value for label, value in precisions.items()}}

    def _average_precisions(self, logits: Tensor, true: Tensor) -> dict[int, float]:
        """Of each label that an image has, by its number."""
        there = true.any(0).nonzero()[:, 0].tolist()
        return {label: average_precision(logits[:, label], true[:, label]) for label in there}


class Numbers(Problem):
    """Each image has a number, which the one output is to be."""

    measures = ("mae", "rmse", "r2", "loss")

    def outputs_of(self, texts: Sequence[str]) -> tuple[str, ...]:
        return ("value",)

    def target(self, text: str, outputs: tuple[str, ...]) -> list[float]:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"the label {text!r} is no number") from None
        if not abs(value) < float("inf"):
            raise ValueError(f"the label {text!r} is not finite")
        return [value]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits, targets)

    def scores(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """Mean absolute error, root of the mean squared error, and the share of the variance that is explained."""
        errors = logits.double() - targets.double()
        squared, variance = errors.square().mean().item(), targets.double().var(correction=0).item()
        return {
            "mae": errors.abs().mean().item(),
            "rmse": squared**0.5,
            "r2": 1 - squared / variance if variance else float("nan"),
            "loss": squared,
        }


PROBLEMS: dict[str, Problem] = {"multilabel": SeveralLabels(), "regression": Numbers()}


def parts(text: str) -> list[str]:
    """The labels in a text."""
    return [name.strip() for name in text.split(BETWEEN) if name.strip()]


def average_precision(scores: Tensor, true: Tensor) -> float:
    """The mean, over the images that have a label, of the precision among all that score at least as high."""
    order = scores.argsort(descending=True, stable=True)
    ranked, hits = scores[order], true[order].double().cumsum(0)
    last = (
        torch.searchsorted(-ranked.double(), -ranked.double(), right=True) - 1
    )  # images of equal score count together
    precision = hits[last] / (last + 1)
    return precision[true[order]].mean().item()


def measure_outputs(
    models: dict[str, nn.Module], images: EvaluationSet, targets: Tensor, problem: Problem, ranks: Ranks, scale: Tensor
) -> tuple[dict[str, float], list[BadImage]]:
    """What `scores` gives of several models over the images of all ranks together, by the prefix of their values.

    targets: of this rank's images, in the labels' own units. scale: mean and deviation by which the models' outputs
    are to be taken, [2]. The models are left in training mode. Raises UserError where no rank can read any image.
    """
    for model in models.values():
        model.eval()
    outputs, index, bad = run_model(images, lambda pixels: torch.stack([model(pixels) for model in models.values()], 1))
    for model in models.values():
        model.train()
    own = (outputs if len(index) else torch.empty(0, len(models), targets.shape[1]), targets[index])
    outputs, targets = (torch.cat(ranks.gather(values)) for values in own)
    bad = together(ranks.gather(bad))
    check_any(targets, bad, images.source)
    values = {}
    for prefix, logits in zip(models, outputs.unbind(1), strict=True):
        found = problem.scores(logits * scale[1] + scale[0], targets)
        values |= {f"{prefix}{name}": value for name, value in found.items()}
    return values, bad
