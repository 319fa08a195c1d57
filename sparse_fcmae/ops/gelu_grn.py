"""GELU and global response normalisation in one pass over the features, as a `torch.library` op."""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.kernels.parameters import row_of
from sparse_fcmae.ops.checks import (
    check_differentiation,
    check_features,
    check_image_offsets,
    check_row,
    differentiable_once,
)


def gelu_grn(x: Tensor, gamma: Tensor, image_offsets: Tensor, beta: Tensor | None = None) -> Tensor:
    """GELU, then global response normalisation over each image's positions (ConvNeXt V2, section 3.2).

    It computes what `model.convnext.Block` says in words and `ops.reference.gelu_grn` in plain PyTorch. Only x and the
    norm of each image's channels are kept for the backward pass, which computes GELU again.

    x: [T, S, S, H] float32 or bfloat16, on a GPU also float16, S one of 8, 4, 2, 1. gamma, beta: [H]; beta may be None.
    image_offsets: int64 [B + 1]; image b has the patches image_offsets[b] to image_offsets[b + 1] of the T.

    Returns [T, S, S, H] of x's dtype; sums are float32. Differentiable once in x, gamma and beta. Raises ValueError for
    other shapes, dtypes or devices. On a GPU the values of image_offsets are not checked.
    """
    check_differentiation("gelu_grn")
    return _gelu_grn(x, gamma, image_offsets, beta)[0]


@torch.library.custom_op("sparse_fcmae::gelu_grn", mutates_args=())
def _gelu_grn(x: Tensor, gamma: Tensor, image_offsets: Tensor, beta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The result; the norm of each image's channels, float32 [B, H]."""
    kernels.check_dtype("gelu_grn", x.device, x.dtype)
    check_features(x)
    check_row("gamma", gamma, x)
    check_row("beta", beta, x)
    check_image_offsets(x, image_offsets)
    x, ours = x.contiguous(), kernels.load("gelu_grn", x.device)
    norm = x.new_empty(len(image_offsets) - 1, x.shape[-1], dtype=torch.float32)
    offsets, out = _in_positions(image_offsets, x), torch.empty_like(x)
    ours.gelu_grn(x.flatten(0, 2), row_of(gamma), offsets, out.flatten(0, 2), norm, beta=row_of(beta))
    return out, norm


@_gelu_grn.register_fake
def _(x, gamma, image_offsets, beta=None):
    norm = gamma.new_empty(image_offsets.shape[0] - 1, x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), norm


@torch.library.custom_op("sparse_fcmae::gelu_grn_backward", mutates_args=())
def _gelu_grn_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, image_offsets: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of gamma and beta, float32 [2, H]."""
    grad, x, ours = grad.contiguous(), x.contiguous(), kernels.load("gelu_grn", x.device)
    grad_x, out = torch.empty_like(x), torch.empty_like(x)
    sums = torch.zeros(3, x.shape[-1], dtype=torch.float32, device=x.device)
    offsets = _in_positions(image_offsets, x)
    tensors = (grad.flatten(0, 2), x.flatten(0, 2), row_of(gamma), offsets, norm, grad_x.flatten(0, 2))
    ours.gelu_grn_backward(*tensors, tuple(sums), out=out.flatten(0, 2))
    return grad_x, sums[1:].clone()


@_gelu_grn_backward.register_fake
def _(grad, x, gamma, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(2, x.shape[-1], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, gamma, image_offsets, beta = inputs
    ctx.beta_dtype = None if beta is None else beta.dtype
    ctx.save_for_backward(x, gamma, image_offsets, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    saved = ctx.saved_tensors  # once, as activation checkpointing asks for
    gamma = saved[1]
    grad_x, (grad_gamma, grad_beta) = _gelu_grn_backward(grad, *saved)
    return grad_x, grad_gamma.to(gamma.dtype), None, None if ctx.beta_dtype is None else grad_beta.to(ctx.beta_dtype)


_gelu_grn.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(_gelu_grn_backward)


def _in_positions(image_offsets: Tensor, x: Tensor) -> Tensor:
    """Offsets that count patches, counted in positions."""
    return image_offsets * (x.shape[1] * x.shape[2])
