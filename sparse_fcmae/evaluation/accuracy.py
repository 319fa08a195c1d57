"""Accuracy of classifiers: of logits in detail, and of models by one pass over images that several processes share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.data.sources import BadImage, LabelledSource
from sparse_fcmae.evaluation.run import EvaluationView, run_model
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
    models: dict[str, nn.Module], source: LabelledSource, view: EvaluationView, ranks: Ranks
) -> tuple[dict[str, float], list[BadImage]]:
    """top1, top5 and loss, the cross-entropy, of several models over the images of all ranks together, in one pass.

    models: by the prefix of their values' names; "ema_" gives ema_top1, ema_top5 and ema_loss. Of up to 5 classes there
    is no top5. The models are left in training mode. source: this rank's images, which may be none. Returns the values
    and all ranks' unreadable images, which are left out.
    """
    sums, bad = torch.zeros(len(models), 4, dtype=torch.float64), []
    if len(source):
        for model in models.values():
            model.eval()
        outputs, index, bad = run_model(
            source, lambda images: torch.stack([model(images) for model in models.values()], 1), view
        )
        for model in models.values():
            model.train()
        labels = source.labels[index]
        for i, logits in enumerate(outputs.unbind(1)):
            right = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[i] = torch.tensor([right[:, 0].sum(), right.sum(), loss, len(labels)])
    values = {}
    for prefix, (top1, top5, loss, images) in zip(models, torch.stack(ranks.gather(sums)).sum(0).tolist(), strict=True):
        values[f"{prefix}top1"] = top1 / images
        if len(source.classes) > TOP:
            values[f"{prefix}top5"] = top5 / images
        values[f"{prefix}loss"] = loss / images
    return values, [image for images in ranks.gather(bad) for image in images]
