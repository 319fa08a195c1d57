"""Random masks over an image's grid of patches (FCMAE, section 3.1)."""

import torch
from torch import Tensor

from sparse_fcmae.runtime.errors import UserError


def num_visible_patches(grid: tuple[int, int], ratio: float) -> int:
    """How many patches of a grid stay visible at a mask ratio: int(L * (1 - ratio)) of L.

    Raises UserError where no patch would be visible or none masked.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"`mask_ratio` {ratio} is not a fraction: choose one between 0 and 1")
    total = grid[0] * grid[1]
    visible = int(total * (1 - ratio))
    if not 0 < visible < total:
        what = "keeps no patch" if visible <= 0 else "masks no patch"
        raise UserError(
            f"`mask_ratio` {ratio} {what} of {grid[0]}x{grid[1]}: choose another, a larger `image_size`, or a smaller "
            "`stem_stride`"
        )
    return visible


def random_mask(
    batch: int,
    grid: tuple[int, int],
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniformly random masks that leave `num_visible_patches(grid, ratio)` patches of every image visible.

    Returns bool [batch, rows, cols], True = masked, on `device`, or without it on the generator's. The random numbers
    are drawn on the generator's device, or without one on `device`. The same state of the generator gives the same
    masks wherever the model runs.
    """
    visible = num_visible_patches(grid, ratio)
    draws_on = generator.device if generator else device
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator, device=draws_on)
    mask = torch.ones_like(noise, dtype=torch.bool)
    mask.scatter_(1, noise.argsort(dim=1)[:, :visible], False)
    return mask.view(batch, *grid).to(device)
