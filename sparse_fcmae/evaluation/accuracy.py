"""Accuracy of classifiers: of logits in detail, and of models by one pass over images that several processes share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.evaluation.run import EvaluationSet, check_any, run_model, together
from sparse_fcmae.runtime.distributed import Ranks

TOP = 5  # outputs among which the right one is looked for


def accuracy(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """top1, top5, top-1 by class and the confusion matrix of logits [N, K] of K classes, given labels int64 [N].

    Of up to 5 classes there is no top5, as it would always be 1.
    """
    ranked = logits.topk(min(TOP, len(classes)), dim=1).indices
    right = ranked == labels[:, None]
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels, ranked[:, 0]), torch.ones_like(labels), accumulate=True)
    images = counts.sum(1)
    top1_of_class = (counts.diagonal() / images).tolist()
    return {
        "images": len(labels),
        "top1": right[:, 0].float().mean().item(),
        **({"top5": right.any(1).float().mean().item()} if len(classes) > TOP else {}),
        "by_class": {name: top1_of_class[i] for i, name in enumerate(classes) if images[i]},
        "confusion": {"classes": list(classes), "counts": counts.tolist()},
    }


def measure(
    models: dict[str, nn.Module], images: EvaluationSet, ranks: Ranks
) -> tuple[dict[str, float], list[BadImage]]:
    """top1, top5 and loss, the cross-entropy, of several models over the images of all ranks together, in one pass.

    models: by the prefix of their values' names; "ema_" gives ema_top1, ema_top5 and ema_loss. Of up to 5 classes there
    is no top5. The models are left in training mode. images: this rank's, which may be none. Returns the values and all
    ranks' unreadable images, which are left out. Raises UserError where no rank can read any.
    """
    labels, sums = images.source.labels, torch.zeros(len(models), 4, dtype=torch.float64)
    for model in models.values():
        model.eval()
    outputs, index, bad = run_model(images, lambda pixels: torch.stack([model(pixels) for model in models.values()], 1))
    for model in models.values():
        model.train()
    for i, logits in enumerate(outputs.unbind(1) if len(index) else ()):
        right = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[index][:, None]
        loss = F.cross_entropy(logits, labels[index], reduction="sum")
        sums[i] = torch.tensor([right[:, 0].sum(), right.sum(), loss, len(index)])
    sums, bad = torch.stack(ranks.gather(sums)).sum(0), together(ranks.gather(bad))
    check_any(sums[:, 3].nonzero(), bad, images.source)
    values = {}
    for prefix, (top1, top5, loss, count) in zip(models, sums.tolist(), strict=True):
        values[f"{prefix}top1"] = top1 / count
        if len(images.source.classes) > TOP:
            values[f"{prefix}top5"] = top5 / count
        values[f"{prefix}loss"] = loss / count
    return values, bad
