"""LayerNorm over the channels of visible patches, cast and laid out in windows, as a `torch.library` op."""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.kernels.parameters import row_of
from sparse_fcmae.ops.checks import check_differentiation, check_row, differentiable_once


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, tile: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the channels, eps 1e-6, laid out for a convolution whose kernel size and stride are `tile`.

    x: [T, S, S, C] float32 or bfloat16, on a GPU also float16, S a multiple of tile. weight and bias: [C].

    Returns [T, S / tile, S / tile, tile * tile * C] of `dtype`, x's if None: in each row the positions of a window in
    order. Sums are float32; x is kept for the backward pass. Differentiable once in x, weight and bias. Raises
    ValueError for other shapes, dtypes or devices.
    """
    check_differentiation("layer_norm")
    return _layer_norm(x, weight, bias, tile, dtype or x.dtype)


@torch.library.custom_op("sparse_fcmae::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    kernels.check_dtype("layer_norm", x.device, x.dtype, dtype)
    if x.dim() != 4 or x.shape[1] != x.shape[2] or tile < 1 or x.shape[1] % tile:
        raise ValueError(f"x must be [T, S, S, C], S a multiple of the tile, not {list(x.shape)} with tile {tile}")
    check_row("weight", weight, x)
    check_row("bias", bias, x)
    normalise = kernels.load("layer_norm", x.device).layer_norm
    return normalise(x.contiguous(), row_of(weight), row_of(bias), _empty_windows(x, tile, dtype), tile=tile)


@_layer_norm.register_fake
def _(x, weight, bias, tile, dtype):
    return _empty_windows(x, tile, dtype)


@torch.library.custom_op("sparse_fcmae::layer_norm_backward", mutates_args=())
def _layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of weight and bias, float32 [2, C]."""
    x, backward = x.contiguous(), kernels.load("layer_norm", x.device).layer_norm_backward
    sums = kernels.of(x.device).zero_sums(2, x.shape[-1], like=x)
    grad_x = backward(x, grad.contiguous(), row_of(weight), torch.empty_like(x), sums, tile=tile)
    return grad_x, sums.sum(0)


@_layer_norm_backward.register_fake
def _(grad, x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(2, x.shape[-1], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.tile, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    grad_x, sums = _layer_norm_backward(grad, x, weight, ctx.tile)
    return grad_x, sums[0].to(weight.dtype), sums[1].to(bias.dtype), None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(_layer_norm_backward)


def _empty_windows(x: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
    patches, side, _, channels = x.shape
    return x.new_empty(patches, side // tile, side // tile, tile * tile * channels, dtype=dtype)
