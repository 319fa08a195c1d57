"""Feature collapse: how alike the channels of a block have become, and how many dimensions embeddings fill.

ConvNeXt V2 (Woo et al., 2023), section 3.2, found that channels of blocks without GRN become alike in masked
autoencoding. RankMe (Garrido et al., 2023) measures embeddings without labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_fcmae.model.convnext import SparseEncoder

DEAD = 0.01  # of the median channel's deviation: below that a channel is as good as constant
EPS = 1e-7  # of RankMe


def channel_distance(maps: Tensor) -> Tensor:
    """The mean cosine distance between the channels of each image's maps [B, C, H, W]: float32 [B], from 0 to 0.5.

    It is the mean over all pairs (i, j) of (1 - cos(x_i, x_j)) / 2, i = j included, where x_i is the map of channel i
    as a vector (ConvNeXt V2, section 3.2). 0 means that all channels are the same but for their size. The cosine to a
    channel that is zero counts as 0.
    """
    x = maps.float().flatten(2)
    x = x / x.norm(dim=2, keepdim=True).clamp_min(1e-12)
    # the sum of the cosines of all pairs is the squared norm of the sum of all vectors
    return (1 - x.sum(1).square().sum(1) / x.shape[1] ** 2) / 2


def rank_me(features: Tensor) -> float:
    """The effective rank of embeddings [N, D], from 1 to min(N, D).

    It is exp of the entropy of the singular values by their sum (RankMe, equation 1).
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum().clamp_min(1e-300) + EPS
    return float((-(p * p.log()).sum()).exp())


@dataclass
class BlockStatistics:
    """What is found of a block's expanded features, those behind GRN, over all images that were added.

    name: of the block, as "3.2" for the second one of stage 3. distances: `channel_distance` of each image.
    """

    name: str
    distances: list[Tensor] = field(default_factory=list)
    count: int = 0
    sums: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, maps: Tensor) -> None:
        """Adds images' maps [B, C, H, W]."""
        self.distances.append(channel_distance(maps).cpu())
        values = maps.double()
        self.count += maps.shape[0] * maps.shape[2] * maps.shape[3]
        self.sums = self.sums + values.sum((0, 2, 3))
        self.squares = self.squares + values.square().sum((0, 2, 3))

    @property
    def distance(self) -> float:
        """The mean over the images."""
        return torch.cat(self.distances).mean().item()

    @property
    def dead(self) -> float:
        """The fraction of channels that are as good as constant over all positions of all images."""
        variance = (self.squares / self.count - (self.sums / self.count) ** 2).clamp_min(0)
        deviation = variance.sqrt()
        return (deviation < DEAD * deviation.median()).double().mean().item() if deviation.any() else 1.0


def expanded_features(encoder: SparseEncoder, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each block's name and what its second product takes, [B, 4 * D, H, W], of normalised images; at last the output.

    The output, [B, D, H, W] of the last block, comes under the name "output".
    """
    x, patches = images, encoder.patches(images)
    for stage, (downsample, blocks) in enumerate(zip(encoder.downsample_layers, encoder.stages, strict=True)):
        x = downsample(x, patches)
        for number, block in enumerate(blocks):
            yield f"{stage + 1}.{number + 1}", patches.scatter(block.expanded(x, patches))
            x = block(x, patches)
    yield "output", patches.scatter(x)
