"""The error of each masked patch's prediction, straight from the pixels, as a `torch.library` op."""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.ops.checks import check_differentiation, check_patches, check_pixels, differentiable_once


def patch_errors(
    prediction: Tensor, pixels: Tensor, rows: Tensor, statistics: Tensor | None = None, *, normalised: bool = True
) -> Tensor:
    """The mean squared error of the predictions of patches of images, float32 [M] (ConvNeXt V2, section 3.1).

    prediction: [M, P * P * C] float32 or bfloat16, on a GPU also float16, a patch's pixels in (row, column, channel)
    order, P the patch's side. pixels: [B, C, H, W] in any order in memory; H and W are multiples of P. rows: int64 [M],
    which patches: flat positions in [B, H / P, W / P].

    statistics: float64 [2, C], mean and deviation of each channel, by which the pixels are normalised, as
    `reference.normalise` says. Pixels that are not finite are then missing: they count neither in the targets nor in
    the error, and the error of a patch without any other is 0. Without statistics the pixels are normalised already.
    normalised: whether each target patch is normalised by its own mean and unbiased variance, eps 1e-6.

    Sums are float32. Kept for the backward pass are prediction and pixels; no target is. Differentiable once in the
    prediction. Raises ValueError for other shapes, dtypes or devices, and for rows out of range, which on a GPU are not
    looked at.
    """
    check_differentiation("patch_errors")
    return _patch_errors(prediction, pixels, rows, statistics, normalised)


@torch.library.custom_op("sparse_fcmae::patch_errors", mutates_args=())
def _patch_errors(
    prediction: Tensor, pixels: Tensor, rows: Tensor, statistics: Tensor | None, normalised: bool
) -> Tensor:
    kernels.check_dtype("patch_errors", prediction.device, prediction.dtype)
    side = _side(prediction, pixels)
    check_pixels(pixels, statistics, side, prediction.device)
    check_patches(rows, pixels, side)
    if len(rows) != len(prediction):
        raise ValueError(f"there are {len(rows)} rows for {len(prediction)} predictions")
    errors = prediction.new_empty(len(prediction), dtype=torch.float32)
    run = kernels.load("patch_errors", prediction.device).patch_errors
    return run(prediction.contiguous(), pixels, rows, statistics, errors, side=side, normalised=normalised)


@_patch_errors.register_fake
def _(prediction, pixels, rows, statistics, normalised):
    return prediction.new_empty(prediction.shape[0], dtype=torch.float32)


@torch.library.custom_op("sparse_fcmae::patch_errors_backward", mutates_args=())
def _patch_errors_backward(
    grad: Tensor, prediction: Tensor, pixels: Tensor, rows: Tensor, statistics: Tensor | None, normalised: bool
) -> Tensor:
    prediction, sizes = prediction.contiguous(), {"side": _side(prediction, pixels), "normalised": normalised}
    run = kernels.load("patch_errors", prediction.device).patch_errors_backward
    return run(grad.contiguous(), prediction, pixels, rows, statistics, torch.empty_like(prediction), **sizes)


@_patch_errors_backward.register_fake
def _(grad, prediction, *_):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.normalised = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return _patch_errors_backward(grad, *ctx.saved_tensors, ctx.normalised), None, None, None, None


_patch_errors.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(_patch_errors_backward)


def _side(prediction: Tensor, pixels: Tensor) -> int:
    """The side of the patches that are predicted, in pixels."""
    values, channels = prediction.shape[-1], pixels.shape[1] if pixels.dim() == 4 else 1
    side = round((values / max(1, channels)) ** 0.5)
    if prediction.dim() != 2 or side < 1 or side * side * channels != values:
        raise ValueError(f"prediction must be [M, P * P * {channels}], not {list(prediction.shape)}")
    return side
