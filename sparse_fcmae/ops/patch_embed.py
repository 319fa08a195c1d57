"""The stem at the visible patches, straight from the pixels, as a `torch.library` op.

How it runs differs between devices: `kernels/cpu/patch_embed.py` takes a few patches at a time through the caches,
`kernels/triton/patch_embed.py` the whole batch at once.
"""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.ops.checks import check_differentiation, check_patches, check_pixels, differentiable_once
from sparse_fcmae.ops.context import product_dtype
from sparse_fcmae.ops.flops import counted


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    rows: Tensor,
    statistics: Tensor | None = None,
) -> Tensor:
    """LayerNorm of the convolution of the patches' pixels: [T, 8, 8, D] (ConvNeXt V2, appendix A).

    pixels: [B, C, H, W] in any order in memory; H and W are multiples of the patch's side, 8 k. weight: [D, C, k, k],
    of a convolution of stride k; bias, norm_weight, norm_bias: [D]. rows: int64 [T], which patches: flat positions in
    [B, H / 8 k, W / 8 k]. statistics: as in `patch_errors`; here a missing pixel counts as its channel's mean.

    The result has norm_weight's dtype. The matrix products are in autocast's dtype, or without autocast in weight's;
    sums are float32. Kept for the backward pass are the pixels, or without statistics, as normalised images are large
    and seldom kept otherwise, the windows of the patches. Differentiable once in the four parameters, not in the
    pixels. Raises ValueError for other shapes, dtypes or devices, and for rows out of range, which on a GPU are not
    looked at.
    """
    check_differentiation("patch_embed")
    parameters = (weight, bias, norm_weight, norm_bias)
    keep = statistics is None and torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    return _patch_embed(pixels, *parameters, rows, statistics, product_dtype(weight), keep)[0]


@torch.library.custom_op("sparse_fcmae::patch_embed", mutates_args=())
def _patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    rows: Tensor,
    statistics: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result; the windows [T * 64, k * k * C] of dtype where they are kept, else no rows."""
    kernels.check_dtype("patch_embed", pixels.device, dtype, norm_weight.dtype)
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[1:2] != pixels.shape[1:2]:
        raise ValueError(f"weight must be [D, C, k, k] for pixels of C channels, not {list(weight.shape)}")
    check_pixels(pixels, statistics, SIDES[0] * weight.shape[2], weight.device)
    check_patches(rows, pixels, SIDES[0] * weight.shape[2])
    for name, row in {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        if row.shape != weight.shape[:1] or row.device != weight.device:
            raise ValueError(f"{name} must be [{len(weight)}] on {weight.device}, not {list(row.shape)}")
    run = kernels.load("patch_embed", pixels.device).patch_embed
    return run(pixels, weight, bias, norm_weight, norm_bias, rows, statistics, dtype, keep)


@_patch_embed.register_fake
def _(pixels, weight, bias, norm_weight, norm_bias, rows, statistics, dtype, keep):
    windows = rows.shape[0] * SIDES[0] ** 2 if keep else 0
    kept = weight.new_empty(windows, weight[0].numel(), dtype=dtype)
    return norm_weight.new_empty(rows.shape[0], SIDES[0], SIDES[0], weight.shape[0]), kept


@torch.library.custom_op("sparse_fcmae::patch_embed_backward", mutates_args=())
def _patch_embed_backward(
    grad: Tensor,
    pixels: Tensor | None,
    kept: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    rows: Tensor,
    statistics: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight and bias, and of the norm's weight and bias, float32 [2, D].

    pixels: None where the windows are kept.
    """
    run = kernels.load("patch_embed", grad.device).patch_embed_backward
    return run(grad.contiguous(), pixels, kept, weight, bias, norm_weight, rows, statistics, dtype)


@_patch_embed_backward.register_fake
def _(grad, pixels, kept, weight, bias, *_):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias)]
    return *like, weight.new_empty(2, weight.shape[0], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    pixels, weight, bias, norm_weight, norm_bias, rows, statistics, ctx.dtype, keep = inputs
    ctx.save_for_backward(None if keep else pixels, output[1], weight, bias, norm_weight, norm_bias, rows, statistics)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    pixels, kept, weight, bias, norm_weight, norm_bias, rows, statistics = ctx.saved_tensors
    others = (pixels, kept, weight, bias, norm_weight, rows, statistics, ctx.dtype)
    grad_weight, grad_bias, norm = _patch_embed_backward(grad, *others)
    of_norm = (norm[0].to(norm_weight.dtype), norm[1].to(norm_bias.dtype))
    return None, grad_weight, grad_bias, *of_norm, None, None, None, None


_patch_embed.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(_patch_embed_backward)


def _flops(pixels, weight, bias, norm_weight, norm_bias, rows, *_):
    return 2 * len(rows) * SIDES[0] ** 2 * weight.numel()


def _flops_of_gradients(grad, pixels, kept, weight, bias, norm_weight, rows, *_):
    return 2 * len(rows) * SIDES[0] ** 2 * weight.numel()


counted("patch_embed", _flops)
counted("patch_embed_backward", _flops_of_gradients)
