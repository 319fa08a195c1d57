"""The C++ kernels as functions on contiguous CPU tensors; what is computed is said in the .cpp file of the same name.

`slot` and `index` are `masking.VisiblePatches`'. Features hold whole images, whose first patch is number `first` of the
batch. Sums over all positions are added to a row for each thread ([threads, ...], see `zero_sums`).
"""

import torch
from torch import Tensor

from sparse_fcmae.kernels.cpu.library import call, instruction_set, unusable

__all__ = [
    "block_dwconv",
    "block_dwconv_weight",
    "gelu_grn",
    "gelu_grn_backward",
    "instruction_set",
    "layer_norm",
    "layer_norm_backward",
    "one_mask",
    "unusable",
    "zero_sums",
]

DTYPES = (torch.float32, torch.bfloat16)  # of features
ON_HOST = True  # what tensors hold can be read without waiting for a device


def block_dwconv(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    index: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    residual: Tensor | None = None,
    convolved: Tensor | None = None,
) -> Tensor:
    """out = convolution + residual, or with norm = (weight, bias) its LayerNorm, and `convolved` what that is taken of.

    x [T, S, S, C] and out are each float32 or bfloat16, residual is as out, all else float32: taps [49, C], bias [C].
    """
    blocks = _blocks(x, slot, index, first)
    call("block_dwconv", x, _bf16(x), taps, bias, *norm, residual, *blocks, convolved, out, _bf16(out))
    return out


def block_dwconv_weight(x: Tensor, grad: Tensor, slot: Tensor, index: Tensor, sums: Tensor, *, first: int = 0) -> None:
    """Adds the gradients of the taps, then of the bias, to sums [threads, 50, C], for grad float32, as x."""
    call("block_dwconv_weight", x, _bf16(x), grad, *_blocks(x, slot, index, first), sums)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, tile: int = 1) -> Tensor:
    """out [T, S / tile, S / tile, tile * tile * C] of x [T, S, S, C], each float32 or bfloat16; all else float32."""
    blocks, side, _, channels = x.shape
    call("layer_norm", x, _bf16(x), weight, bias, blocks, side, channels, tile, out, _bf16(out))
    return out


def layer_norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, grad_x: Tensor, sums: Tensor, *, tile: int = 1
) -> Tensor:
    """grad_x, which may be x; adds the gradients of weight and bias to sums [threads, 2, C]."""
    blocks, side, _, channels = x.shape
    size = (blocks, side, channels, tile)
    call("layer_norm_backward", x, _bf16(x), grad, _bf16(grad), weight, *size, grad_x, sums)
    return grad_x


def gelu_grn(
    x: Tensor,
    gamma: Tensor,
    offsets: Tensor,
    out: Tensor,
    norm: Tensor,
    *,
    bias: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """out, which may be x, and norm [B, H], for the backward pass; x [N, H] float32 or bfloat16.

    bias, which is added to x, gamma and beta [H] are float32; offsets [B + 1] count positions.
    """
    call("gelu_grn", x, _bf16(x), bias, gamma, beta, offsets, len(offsets) - 1, x.shape[-1], out, norm)
    return out


def gelu_grn_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    offsets: Tensor,
    norm: Tensor,
    grad_x: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    *,
    out: Tensor,
    slope: Tensor,
    bias: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """grad_x, which may be grad, and once more the forward pass's out; slope is scratch, and may be x.

    Adds the gradients of bias (the sum of grad_x over all positions), gamma and beta to sums, each [H].
    """
    size = (len(offsets) - 1, x.shape[-1])
    call("gelu_grn_backward", grad, x, _bf16(x), bias, gamma, beta, offsets, norm, *size, grad_x, out, slope, *sums)
    return grad_x


def one_mask(slot: Tensor, index: Tensor, offsets: Tensor | None = None) -> bool:
    """Whether slot and index describe one mask, and offsets, which ascend from 0 to [T], divide no image's patches."""
    images, rows, cols = slot.shape[0], slot.shape[1] - 6, slot.shape[2] - 6
    ends = (None, 0) if offsets is None else (offsets.contiguous(), len(offsets))
    return bool(call("one_mask", slot.contiguous(), index.contiguous(), images, rows, cols, len(index), *ends))


def zero_sums(*shape: int, like: Tensor) -> Tensor:
    """Zeros [threads, ...], float32, on the device of `like`."""
    return like.new_zeros(torch.get_num_threads(), *shape, dtype=torch.float32)


def _bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _blocks(x: Tensor, slot: Tensor, index: Tensor, first: int) -> tuple:
    blocks, side, _, channels = x.shape
    return slot.contiguous(), index.contiguous(), first, blocks, slot.shape[1] - 6, slot.shape[2] - 6, side, channels
