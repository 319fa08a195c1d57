"""Masks over the patch grid, and the visible patches' places in a batch.

Shapes: B images, a grid of `rows` x `cols` patches each, T visible patches in the whole batch sorted by image, S x S
positions a patch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.errors import UserError

HALO = 3  # positions that a 7x7 window reaches beyond its centre; at S = 1 that many patches


def kept_patches(grid: tuple[int, int], ratio: float) -> int:
    """Patches that stay visible of a `grid` at a mask `ratio`: int(L * (1 - ratio)), at least one and not all.

    Raises UserError where no patch would be kept or none masked.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"mask ratio {ratio} is not a share: choose a --mask-ratio between 0 and 1")
    total = grid[0] * grid[1]
    kept = int(total * (1 - ratio))
    if not 0 < kept < total:
        what = "keeps no patch" if kept <= 0 else "masks no patch"
        raise UserError(
            f"mask ratio {ratio} {what} of {grid[0]}x{grid[1]}: choose another --mask-ratio, or larger "
            "images or a smaller stride of the stem"
        )
    return kept


def random_mask(
    batch: int,
    grid: tuple[int, int],
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniformly random masks keeping `kept_patches(grid, ratio)` patches of every image (FCMAE, section 3.1).

    Returns bool [batch, rows, cols], True = masked, on `device`, or without it on the generator's. Drawn on the
    generator's device, without one on `device`; the same generator state gives the same masks wherever the model runs.
    """
    kept = kept_patches(grid, ratio)
    drawn_on = generator.device if generator else device
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator, device=drawn_on)
    mask = torch.ones_like(noise, dtype=torch.bool)
    mask.scatter_(1, noise.argsort(dim=1)[:, :kept], False)
    return mask.view(batch, *grid).to(device)


@dataclass(frozen=True)
class VisiblePatches:
    """Where the visible patches of a batch are.

    mask: bool [B, rows, cols], True = masked.
    index: int64 [T], each visible patch's flat position in [B, rows, cols], ascending (thus sorted by image).
    slot: int32 [B, rows + 6, cols + 6], each patch's row in T, -1 where masked or outside the image.
    offsets: int64 [B + 1], image b owns the patches offsets[b] to offsets[b + 1].
    """

    mask: Tensor
    index: Tensor
    slot: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, mask: Tensor, kept: int | None = None) -> "VisiblePatches":
        """The visible patches of `mask`.

        kept: how many patches every image keeps. All shapes then follow from it, and nothing waits for a GPU. Without
        it images may keep different numbers of patches, none included.
        """
        hidden, device = mask.flatten(1), mask.device
        images, total = hidden.shape
        counts = (~hidden).sum(1)
        if kept is None:
            index = (~mask).flatten().nonzero()[:, 0]
            offsets = F.pad(counts.cumsum(0), (1, 0))
        else:
            torch._assert_async((counts == kept).all(), "not all masks keep `kept` patches")
            visible_first = hidden.to(torch.uint8).argsort(dim=1, stable=True)
            index = (visible_first[:, :kept] + torch.arange(images, device=device)[:, None] * total).flatten()
            offsets = torch.arange(images + 1, device=device) * kept
        number = (~mask).flatten().cumsum(0).view(mask.shape) - 1
        slot = F.pad(number.masked_fill(mask, -1).int(), (HALO, HALO, HALO, HALO), value=-1)
        return cls(mask, index, slot, offsets)

    def offsets_of(self, scope: str) -> Tensor:
        """The offsets of what GRN pools over: each "image", or the whole "batch" as if it were one."""
        return self.offsets if scope == "image" else torch.stack([self.offsets[0], self.offsets[-1]])

    @property
    def image(self) -> Tensor:
        """int64 [T]: the image that each visible patch belongs to."""
        return self.index // (self.mask.shape[1] * self.mask.shape[2])
