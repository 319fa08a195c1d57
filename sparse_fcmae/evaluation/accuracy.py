"""Accuracy of classifiers: of answers in detail, and of models by one pass over images that several processes share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.evaluation.run import EvaluationSet, check_any, run_model, together
from sparse_fcmae.runtime.distributed import Ranks

TOP = 5  # outputs among which the right one is looked for


def accuracy(ranked: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """top1, top5, balanced_accuracy, top-1 by class and the confusion matrix, given labels int64 [N].

    ranked: int64 [N, up to TOP], the most probable classes, the first one first. balanced_accuracy: the mean of the
    classes' top-1. Of up to 5 classes there is no top5, as it would always be 1.
    """
    right = ranked == labels[:, None]
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels, ranked[:, 0]), torch.ones_like(labels), accumulate=True)
    images = counts.sum(1)
    top1_of_class = (counts.diagonal() / images).double()
    return {
        "images": len(labels),
        "top1": right[:, 0].float().mean().item(),
        **({"top5": right.any(1).float().mean().item()} if len(classes) > TOP else {}),
        "balanced_accuracy": top1_of_class[images > 0].mean().item(),
        "by_class": {name: top1_of_class[i].item() for i, name in enumerate(classes) if images[i]},
        "confusion": {"classes": list(classes), "counts": counts.tolist()},
    }


def measure(
    models: dict[str, nn.Module], images: EvaluationSet, ranks: Ranks
) -> tuple[dict[str, float], list[BadImage]]:
    """What `measures_of` names, of several models over the images of all ranks together, in one pass.

    models: by the prefix of their values' names; "ema_" gives ema_top1 and so on. loss is the cross-entropy. The models
    are left in training mode. images: this rank's, which may be none. Returns the values and all ranks' unreadable
    images, which are left out. Raises UserError where no rank can read any.
    """
    labels, classes = images.source.labels, len(images.source.classes)
    sums, of_class = torch.zeros(len(models), 3, dtype=torch.float64), torch.zeros(len(models), 2, classes)
    for model in models.values():
        model.eval()
    outputs, index, bad = run_model(images, lambda pixels: torch.stack([model(pixels) for model in models.values()], 1))
    for model in models.values():
        model.train()
    for i, logits in enumerate(outputs.unbind(1) if len(index) else ()):
        right = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[index][:, None]
        loss = F.cross_entropy(logits, labels[index], reduction="sum")
        sums[i] = torch.tensor([right.sum(), loss, len(index)])
        of_class[i] = torch.stack([labels[index][which].bincount(minlength=classes) for which in (right[:, 0], ...)])
    sums, of_class = (torch.stack(ranks.gather(counts)).sum(0) for counts in (sums, of_class))
    bad = together(ranks.gather(bad))
    check_any(sums[:, 2].nonzero(), bad, images.source)
    values = {}
    for prefix, (top5, loss, count), (right, there) in zip(models, sums.tolist(), of_class.double(), strict=True):
        found = {
            "top1": right.sum().item() / count,
            "top5": top5 / count,
            "balanced_accuracy": (right / there)[there > 0].mean().item(),
            "loss": loss / count,
        }
        values |= {f"{prefix}{name}": found[name] for name in measures_of(classes)}
    return values, bad


def measures_of(classes: int) -> tuple[str, ...]:
    """What is measured of a classifier. Of up to 5 classes there is no top5."""
    return ("top1", *(["top5"] if classes > TOP else []), "balanced_accuracy", "loss")
