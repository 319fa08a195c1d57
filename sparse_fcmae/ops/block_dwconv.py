"""Depthwise 7x7 convolution over visible patches, with LayerNorm behind it if asked for, as a `torch.library` op."""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.kernels.constants import TAPS
from sparse_fcmae.kernels.parameters import row_of, taps_of, weight_gradient_of
from sparse_fcmae.ops.checks import (
    check_depthwise_weight,
    check_differentiation,
    check_features,
    check_patch_map,
    check_row,
    differentiable_once,
)
from sparse_fcmae.ops.context import product_dtype
from sparse_fcmae.ops.flops import counted, flops_of_dwconv


def block_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Submanifold 7x7 depthwise convolution over the visible patches of a batch (ConvNeXt V2, section 3.1).

    Each output is the sum over the window's visible positions alone. It equals a dense convolution, padding 3, of the
    features with zeros where masked, taken at the visible positions. With norm_weight and norm_bias [C] (both or
    neither) LayerNorm over the channels follows (eps 1e-6); its input is computed again in the backward pass.

    x: [T, S, S, C] float32 or bfloat16, on a GPU also float16, S one of 8, 4, 2, 1. weight: [C, 1, 7, 7].
    bias: [C] or None. patch_to_row: int32 [B, rows + 6, cols + 6], row_to_patch: int64 [T], as in
    `backends.patch_map.PatchMap`.

    Returns [T, S, S, C] of x's dtype; sums are float32. Under autocast x is cast to the autocast dtype. Differentiable
    once in x and all parameters. Raises ValueError for other shapes, dtypes or devices. On a GPU it is not checked that
    the two maps are of one mask, as the host would have to wait for their values.
    """
    check_differentiation("block_dwconv")
    x = x.to(product_dtype(x))
    return _block_dwconv(x, weight, bias, patch_to_row, row_to_patch, norm_weight, norm_bias)


@torch.library.custom_op("sparse_fcmae::block_dwconv", mutates_args=())
def _block_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    kernels.check_dtype("block_dwconv", x.device, x.dtype)
    check_features(x)
    check_depthwise_weight(weight, x)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias go together")
    for name, row in {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        check_row(name, row, x)
    check_patch_map(x, patch_to_row, row_to_patch)
    x, norm, maps = x.contiguous(), (row_of(norm_weight), row_of(norm_bias)), (patch_to_row, row_to_patch)
    convolve = kernels.load("block_dwconv", x.device).block_dwconv
    return convolve(x, taps_of(weight), row_of(bias), *maps, torch.empty_like(x), norm=norm)


@_block_dwconv.register_fake
def _(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("sparse_fcmae::block_dwconv_backward", mutates_args=())
def _block_dwconv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x; of the 49 taps, then of the bias, float32 [50, C]; of the norm's parameters, float32 [2, C].

    Where weight and bias are frozen, their gradients are zeros.
    """
    x, taps, channels, maps = x.contiguous(), taps_of(weight), x.shape[-1], (patch_to_row, row_to_patch)
    conv, norm = (kernels.load(op, x.device) for op in ("block_dwconv", "layer_norm"))
    zero_sums = kernels.of(x.device).zero_sums
    sums, norm_sums = zero_sums(TAPS + 1, channels, like=x), zero_sums(2, channels, like=x)
    if norm_weight is None:
        grad = grad.float().contiguous()
    else:
        y = conv.block_dwconv(x, taps, row_of(bias), *maps, torch.empty_like(x, dtype=torch.float32))
        grad = norm.layer_norm_backward(y, grad.contiguous(), row_of(norm_weight), y, norm_sums)
    if not frozen:
        conv.block_dwconv_weight(x, grad, *maps, sums)
    grad_x = conv.block_dwconv(grad, taps.flip(0), None, *maps, torch.empty_like(x))
    return grad_x, sums.sum(0), norm_sums.sum(0)


@_block_dwconv_backward.register_fake
def _(grad, x, *_):
    sums = [x.new_empty(rows, x.shape[-1], dtype=torch.float32) for rows in (TAPS + 1, 2)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *sums


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    saved = ctx.saved_tensors  # once, as activation checkpointing asks for
    _, weight, bias, _, _, norm_weight, norm_bias = saved
    frozen = not any(ctx.needs_input_grad[1:3])
    grad_x, sums, norm_sums = _block_dwconv_backward(grad, *saved, frozen)
    rows = zip((sums[TAPS], *norm_sums), (bias, norm_weight, norm_bias), strict=True)
    grad_bias, *grad_norm = (None if like is None else row.to(like.dtype, copy=True) for row, like in rows)
    return grad_x, weight_gradient_of(sums, weight), grad_bias, None, None, *grad_norm


_block_dwconv.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(_block_dwconv_backward)


def _flops_of_gradients(grad, x, weight, bias, patch_to_row, *rest):
    frozen = rest[-1]
    return (1 if frozen else 2) * flops_of_dwconv(x, patch_to_row)


counted("block_dwconv", lambda x, weight, bias, patch_to_row, *_: flops_of_dwconv(x, patch_to_row))
counted("block_dwconv_backward", _flops_of_gradients)
