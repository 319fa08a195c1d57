"""From a mask to the places of the visible patches.

Shapes: B images, a grid of `rows` x `cols` patches each, T visible patches in the whole batch, sorted by image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.kernels.constants import HALO
from sparse_fcmae.runtime.errors import UserError


@dataclass(frozen=True)
class PatchMap:
    """Where the visible patches of a batch are.

    mask: bool [B, rows, cols], True = masked.
    row_to_patch: int64 [T], each visible patch's flat position in [B, rows, cols], ascending (thus sorted by image).
    patch_to_row: int32 [B, rows + 6, cols + 6], each patch's row in T, or -1 where it is masked or outside the image.
        The border is as wide as a 7x7 window reaches in the last stage, where a patch is one position.
    image_offsets: int64 [B + 1], image b has the patches image_offsets[b] to image_offsets[b + 1].
    """

    mask: Tensor
    row_to_patch: Tensor
    patch_to_row: Tensor
    image_offsets: Tensor

    @classmethod
    def of(cls, mask: Tensor, num_visible: int | None = None) -> "PatchMap":
        """The visible patches of `mask`.

        num_visible: how many patches of every image are visible. All shapes then follow from it, and nothing waits for
        a GPU. Without it images may have different numbers of visible patches, none included.
        """
        counts = (~mask).flatten(1).sum(1)
        row_to_patch = flat_positions(~mask, num_visible)
        if num_visible is None:
            image_offsets = F.pad(counts.cumsum(0), (1, 0))
        else:
            torch._assert_async((counts == num_visible).all(), "not all masks have `num_visible` visible patches")
            image_offsets = torch.arange(len(mask) + 1, device=mask.device) * num_visible
        number = (~mask).flatten().cumsum(0).view(mask.shape) - 1
        patch_to_row = F.pad(number.masked_fill(mask, -1).int(), (HALO, HALO, HALO, HALO), value=-1)
        return cls(mask, row_to_patch, patch_to_row, image_offsets)

    def pooled(self, scope: str) -> Tensor:
        """The offsets of what GRN pools over: each "image", or the whole "batch" as if it were one image."""
        return self.image_offsets if scope == "image" else torch.stack([self.image_offsets[0], self.image_offsets[-1]])

    @property
    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of each visible patch, int64 [T] each."""
        _, rows, cols = self.mask.shape
        return self.row_to_patch // (rows * cols), self.row_to_patch // cols % rows, self.row_to_patch % cols


def flat_positions(chosen: Tensor, of_image: int | None = None) -> Tensor:
    """The flat positions of what is True in bool [B, rows, cols], ascending, int64.

    of_image: how many there are of every image. The result's shape then follows from it, and nothing waits for a GPU.
    """
    if of_image is None:
        if chosen.is_meta:
            raise UserError("a mask on the meta device does not say what is visible: give `num_visible`")
        return chosen.flatten().nonzero()[:, 0]
    images, total = chosen.flatten(1).shape
    chosen_first = (~chosen.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)
    first_of_image = torch.arange(images, device=chosen.device)[:, None] * total
    return (chosen_first[:, :of_image] + first_of_image).flatten()
