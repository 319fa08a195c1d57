"""How `torch.utils.flop_counter` counts the ops: their matrix products and the taps of their convolutions.

Multiplication and addition count as two, as PyTorch has it. Of a convolution's taps those between two visible positions
count. Gradients count as what they are; what a backward pass computes again does not.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from sparse_fcmae.kernels.constants import HALO, WINDOW


def counted(op: str, formula: Callable[..., int]) -> None:
    """Has an op of this package counted by a formula, which gets the op's arguments as they are."""
    register_flop_formula(getattr(torch.ops.sparse_fcmae, op), get_raw=True)(
        lambda *arguments, out_val=None, **others: formula(*arguments, **others)
    )


def flops_of_linear(x: Tensor, weight: Tensor) -> int:
    """Of x weight^T: [..., K] and [N, K]."""
    return 2 * x.numel() * weight.shape[0]


def flops_of_dwconv(x: Tensor, patch_to_row: Tensor) -> int:
    """Of the depthwise convolution of features [T, S, S, C], with the map that `ops.block_dwconv` takes.

    Where tensors are fake, so that no one knows what is visible, all taps count.
    """
    if isinstance(patch_to_row, FakeTensor):
        return 2 * WINDOW**2 * x.numel()
    mask = patch_to_row[:, HALO:-HALO, HALO:-HALO] < 0
    return 2 * visible_taps(mask, x.shape[1]) * x.shape[3]


def visible_taps(mask: Tensor, side: int) -> int:
    """How many taps of a 7x7 window around each visible position are visible, in all.

    mask: bool [B, rows, cols] over patches of side x side positions, True = masked.
    """
    seen = (~mask).repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None].double()
    window = torch.ones(1, 1, WINDOW, WINDOW, dtype=torch.double, device=mask.device)
    return int((F.conv2d(seen, window, padding=HALO) * seen).sum().item())
