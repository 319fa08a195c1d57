"""The specification of every op in plain PyTorch: any device, any floating dtype, differentiable by autograd.

Kernels are tested against these functions in float64, and the `torch` backend runs them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GRN_EPS = NORM_EPS = 1e-6


def block_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    index: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Submanifold 7x7 depthwise convolution: `ops.block_dwconv`, by way of a dense canvas that is zero where masked."""
    _, side, _, channels = x.shape
    batch, rows, cols = slot.shape[0], slot.shape[1] - 6, slot.shape[2] - 6
    canvas = x.new_zeros(batch * rows * cols, side, side, channels).index_copy(0, index, x)
    canvas = canvas.view(batch, rows, cols, side, side, channels).transpose(2, 3)
    canvas = canvas.reshape(batch, rows * side, cols * side, channels).permute(0, 3, 1, 2)
    out = F.conv2d(canvas, weight, bias, padding=3, groups=channels).permute(0, 2, 3, 1)
    out = out.reshape(batch, rows, side, cols, side, channels).transpose(2, 3)
    out = out.reshape(batch * rows * cols, side, side, channels)[index]
    return out if norm_weight is None else layer_norm(out, norm_weight, norm_bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, tile: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the channels, then windows of tile x tile positions side by side: `ops.layer_norm`."""
    blocks, side, _, channels = x.shape
    out = F.layer_norm(x, (channels,), weight, bias, NORM_EPS).to(dtype or x.dtype)
    windows = out.view(blocks, side // tile, tile, side // tile, tile, channels).transpose(2, 3)
    return windows.reshape(blocks, side // tile, side // tile, tile * tile * channels)


def gelu_grn(x: Tensor, gamma: Tensor, offsets: Tensor) -> Tensor:
    """GELU and global response normalisation without beta: `ops.gelu_grn`."""
    h = F.gelu(x)
    squares = torch.segment_reduce(h.to(accumulator(h)).square().sum((1, 2)), "sum", offsets=offsets)
    scale = grn_scale(squares, gamma)
    return h * scale.repeat_interleave(offsets.diff(), 0, output_size=len(h))[:, None, None].to(h.dtype)


def grn_scale(squares: Tensor, gamma: Tensor) -> Tensor:
    """Global response normalisation's factor 1 + gamma * N (ConvNeXt V2, section 3.2) from the sums of squares.

    squares [..., H]: each channel's sum of squares over the positions that are pooled; gamma [H].
    """
    nonzero = squares != 0  # the norm's gradient at zero is taken as zero
    response = torch.where(nonzero, squares, 1).sqrt() * nonzero
    return 1 + gamma * response / (response.mean(-1, keepdim=True) + GRN_EPS)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over x are taken in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
