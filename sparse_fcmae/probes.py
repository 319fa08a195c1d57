"""What features tell without fine-tuning, by nearest neighbours and a linear probe; and the pass over a folder."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sparse_fcmae.data import BadImage, CentredImages, ImageFolder, make_loader, normalise
from sparse_fcmae.encoder import SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.labelled import ClassFolder

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted vote of Wu et al., 2018, section 3.4, as DINO has it
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the linear probe's weights, tried on held-out images


@dataclass(frozen=True)
class Viewing:
    """How images are looked at: size (H, W) in pixels, channels, share of the sides, and what runs the model."""

    size: tuple[int, int]
    in_chans: int
    share: float
    device: torch.device
    bf16: bool = False
    batch_size: int = 64
    workers: int = 0


@torch.no_grad()
def run_over(
    folder: ImageFolder, function: Callable[[Tensor], Tensor], view: Viewing, what: str | None = None
) -> tuple[Tensor, Tensor, list[BadImage]]:
    """A function of normalised images [B, C, H, W] over a folder.

    Returns its outputs, float32 [N, ...] on the CPU, the index of each image, int64 [N], and the unreadable ones, which
    are left out. what: the bar's text; None for no bar. Raises UserError where no image is readable.
    """
    order = torch.arange(len(folder)).split(view.batch_size)
    dataset = CentredImages(folder, view.size, view.in_chans, view.share)
    loader = make_loader(dataset, [part.tolist() for part in order], view.workers, view.device.type == "cuda")
    outputs, index, bad = [], [], []
    with tqdm(total=len(folder), desc=what, unit="image", disable=what is None, dynamic_ncols=True) as bar:
        for batch in loader:
            bad += batch.bad
            if len(batch.pixels):
                images = normalise(batch.pixels.to(view.device, non_blocking=True))
                with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
                    outputs.append(function(images).float().cpu())
                index.append(batch.index)
            bar.update(len(batch.pixels) + len(batch.bad))
    if not outputs:
        raise UserError(f"{folder.root}: no image is readable: {bad[0].file}: {bad[0].reason}")
    return torch.cat(outputs), torch.cat(index), bad


def features_of(
    folder: ClassFolder, encoder: SparseEncoder, view: Viewing, what: str | None = None
) -> tuple[Tensor, Tensor, list[BadImage]]:
    """The mean over positions of an encoder's dense features, float32 [N, D], the labels of a folder's images, and the
    unreadable ones, which are left out."""
    outputs, index, bad = run_over(folder, lambda images: encoder(images).float().mean((2, 3)), view, what)
    return outputs, folder.labels[index], bad


def nearest_neighbours(
    features: Tensor, labels: Tensor, queries: Tensor, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """The label of each query [Q, D], int64 [Q], voted by its k most similar features [N, D].

    Similarity is the cosine of centred features, a vote exp(similarity / temperature).
    """
    mean = features.mean(0)
    known, asked = (F.normalize(x - mean, dim=1) for x in (features, queries))
    k, classes, predicted = min(k, len(known)), int(labels.max()) + 1, []
    for part in asked.split(1024):
        similarity, nearest = (part @ known.T).topk(k)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def linear_probe(features: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """The label of each query [Q, D], int64 [Q], by logistic regression on standardised features [N, D].

    The penalty on the weights is the one of PENALTIES that does best on a fifth of the features, held out.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x, asked = (features - mean) / std, (queries - mean) / std
    held = torch.arange(len(x)) % 5 == 4
    held = held[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    if held.any():
        fits = [_regression(x[~held], labels[~held], penalty) for penalty in PENALTIES]
        right = [(fit(x[held]).argmax(1) == labels[held]).float().mean().item() for fit in fits]
        penalty = PENALTIES[max(range(len(right)), key=right.__getitem__)]
    else:
        penalty = PENALTIES[0]
    return _regression(x, labels, penalty)(asked).argmax(1)


def _regression(x: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
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
