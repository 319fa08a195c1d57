"""How well an encoder's features tell classes apart without fine-tuning: by nearest neighbours and a linear probe."""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.data.sources.class_folder import USUAL, open_train_and_held_out
from sparse_fcmae.data.sources.pages import labelled_by_page
from sparse_fcmae.evaluation.run import EvaluationSet, EvaluationView, check_any, run_model, together
from sparse_fcmae.runtime.distributed import Ranks

Encode = Callable[[Tensor], Tensor]  # images [B, C, H, W] -> features [B, D, rows, cols]
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted vote of Wu et al., 2018, section 3.4, as in DINO
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # on the linear probe's weights, of which held-out images choose one


def features_of(
    images: EvaluationSet, encoder: Encode, description: str | None = None
) -> tuple[Tensor, Tensor, list[BadImage]]:
    """An encoder's features of all images of a set, averaged over the positions: float32 [N, D].

    Returns with them the images' labels, int64 [N], and the unreadable images, which are left out.
    """
    features, index, bad = run_model(images, lambda pixels: encoder(pixels).float().mean((2, 3)), description)
    return features, images.source.labels[index], bad


def nearest_neighbours(
    features: Tensor, labels: Tensor, queries: Tensor, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """The class that the k most similar of the features [N, D] vote for, of each query [Q, D]: int64 [Q].

    Similarity is the cosine of centred features, and a vote counts exp(similarity / temperature).
    """
    mean = features.mean(0)
    known, asked = F.normalize(features - mean, dim=1), F.normalize(queries - mean, dim=1)
    k, classes, predicted = min(k, len(known)), int(labels.max()) + 1, []
    for part in asked.split(1024):
        similarity, nearest = (part @ known.T).topk(k)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


class KNNMonitor:
    """k-NN accuracy of an encoder while it trains. All ranks compute the features of their part of the images.

    root: a folder with train and val or test, each of class folders, or what else names labelled images. config: how.
    fingerprint: of the images of all ranks.
    """

    def __init__(
        self, root: str | os.PathLike, view: EvaluationView, ranks: Ranks, config: SourceConfig = USUAL
    ) -> None:
        self.ranks = ranks
        parts = ranks.main_first(
            lambda: [labelled_by_page(part, view.reading) for part in open_train_and_held_out(root, config=config)]
        )
        self.fingerprint = " ".join(part.fingerprint for part in parts)
        own = (part.take(range(ranks.rank, len(part), ranks.world)) for part in parts)
        self.train, self.held_out = (EvaluationSet(part, view, ranks) for part in own)

    def top1(self, encoder: Encode) -> tuple[float, list[BadImage]]:
        """The fraction of the held-out images whose class their neighbours vote for, and the unreadable images.

        To be called by all ranks. The unreadable images are left out. Raises UserError where none is readable.
        """
        features, labels, bad = self._gathered_features(self.train, encoder)
        queries, truth, bad_queries = self._gathered_features(self.held_out, encoder)
        right = nearest_neighbours(features, labels, queries) == truth
        return right.float().mean().item(), bad + bad_queries

    def _gathered_features(self, images: EvaluationSet, encoder: Encode) -> tuple[Tensor, Tensor, list[BadImage]]:
        """Features and labels of the parts of all ranks, some of which may have no images that can be read."""
        features, labels, bad = zip(*self.ranks.gather(features_of(images, encoder)), strict=True)
        bad = together(bad)
        check_any(torch.cat(labels), bad, images.source)
        return torch.cat([part for part in features if len(part)]), torch.cat(labels), bad


def linear_probe(features: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """The class of each query [Q, D], int64 [Q], by logistic regression on standardised features [N, D].

    The penalty on the weights is the one of PENALTIES that does best on a fifth of the features, held out.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x, asked = (features - mean) / std, (queries - mean) / std
    held_out = torch.arange(len(x)) % 5 == 4
    held_out = held_out[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    penalty = PENALTIES[0]
    if held_out.any():
        fits = [_regression(x[~held_out], labels[~held_out], penalty) for penalty in PENALTIES]
        right = [(fit(x[held_out]).argmax(1) == labels[held_out]).float().mean().item() for fit in fits]
        penalty = PENALTIES[right.index(max(right))]
    return _regression(x, labels, penalty)(asked).argmax(1)


def _regression(x: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
    """A linear layer fitted to labels by cross-entropy, with a penalty on the squares of its weights."""
    model = nn.Linear(x.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), labels) + penalty / 2 * model.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return model.requires_grad_(False)
