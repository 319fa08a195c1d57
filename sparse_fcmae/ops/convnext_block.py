"""A whole ConvNeXt V2 block over visible patches, as a `torch.library` op.

How the block runs differs between devices: `kernels/cpu/convnext_block.py` takes a few images at a time through the
caches, `kernels/triton/convnext_block.py` the whole batch at once.
"""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.ops.checks import (
    check_depthwise_weight,
    check_differentiation,
    check_features,
    check_image_offsets,
    check_patch_map,
    check_row,
    differentiable_once,
)
from sparse_fcmae.ops.context import product_dtype
from sparse_fcmae.ops.flops import counted, flops_of_dwconv, flops_of_linear


def convnext_block(
    x: Tensor, parameters: list[Tensor], patch_to_row: Tensor, row_to_patch: Tensor, image_offsets: Tensor
) -> Tensor:
    """A ConvNeXt V2 block over the visible patches of a batch (ConvNeXt V2, sections 3.1 and 3.2).

    It computes what `model.convnext.Block` says in words, from the parts that `ops.reference` has in plain PyTorch.

    x: [T, S, S, C] float32 or bfloat16, on a GPU also float16, S one of 8, 4, 2, 1. parameters: the block's ten in the
    official order and shapes: weight and bias of dwconv, norm and pwconv1, gamma and beta of GRN, weight and bias of
    pwconv2. patch_to_row, row_to_patch, image_offsets: as in `backends.patch_map.PatchMap`; GRN pools over the patches
    image_offsets[b] to image_offsets[b + 1].

    Returns [T, S, S, C] of x's dtype. The matrix products are in autocast's dtype, or without autocast in that of
    pwconv1; sums are float32. Kept for the backward pass are x, the response norm and, where that is faster than
    computing it again, pwconv1's output. Differentiable once in x and parameters. Raises ValueError for other shapes,
    dtypes or devices. On a GPU it is not checked that the maps are of one mask, as the host would have to wait.
    """
    check_differentiation("convnext_block")
    dtype = product_dtype(parameters[4])
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    return _convnext_block(x, parameters, patch_to_row, row_to_patch, image_offsets, dtype, differentiated)[0]


@torch.library.custom_op("sparse_fcmae::convnext_block", mutates_args=())
def _convnext_block(
    x: Tensor,
    parameters: list[Tensor],
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    image_offsets: Tensor,
    dtype: torch.dtype,
    differentiated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; the response norm, float32 [B, 4 C]; pwconv1's output without its bias where kept, else no rows."""
    kernels.check_dtype("convnext_block", x.device, x.dtype, dtype)
    check_features(x)
    check_image_offsets(x, image_offsets)
    check_patch_map(x, patch_to_row, row_to_patch, image_offsets)
    _check_parameters(x, parameters)
    run = kernels.load("convnext_block", x.device).convnext_block
    keep = _keeps_hidden(x, differentiated)
    return run(x.contiguous(), parameters, patch_to_row, row_to_patch, image_offsets, dtype, keep)


@_convnext_block.register_fake
def _(x, parameters, patch_to_row, row_to_patch, image_offsets, dtype, differentiated):
    hidden = parameters[4].shape[0]
    keep = _keeps_hidden(x, differentiated)
    response = x.new_empty(image_offsets.shape[0] - 1, hidden, dtype=torch.float32)
    kept = x.new_empty(x.shape[0] * x.shape[1] * x.shape[2] if keep else 0, hidden, dtype=dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), response, kept


@torch.library.custom_op("sparse_fcmae::convnext_block_backward", mutates_args=())
def _convnext_block_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    image_offsets: Tensor,
    dtype: torch.dtype,
    response: Tensor,
    kept: Tensor,
    frozen: bool,
) -> list[Tensor]:
    """The gradients of x and, unless they are frozen, of the parameters."""
    run = kernels.load("convnext_block", x.device).convnext_block_backward
    maps = (patch_to_row, row_to_patch, image_offsets)
    return run(grad.contiguous(), x.contiguous(), parameters, *maps, dtype, response, kept, frozen)


@_convnext_block_backward.register_fake
def _(grad, x, parameters, *rest):
    frozen = rest[-1]
    like = (x,) if frozen else (x, *parameters)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


def _setup_context(ctx, inputs, output):
    x, parameters, *maps, ctx.dtype, _ = inputs
    ctx.save_for_backward(x, *maps, *output[1:], *parameters)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    x, patch_to_row, row_to_patch, image_offsets, response, kept, *parameters = ctx.saved_tensors
    grad_x, grads = None, [None] * len(parameters)
    if grad is not None:
        frozen = not any(ctx.needs_input_grad[1])
        features = (grad, x, parameters, patch_to_row, row_to_patch, image_offsets)
        grad_x, *computed = _convnext_block_backward(*features, ctx.dtype, response, kept, frozen)
        grads = computed or grads
    return grad_x, grads, None, None, None, None, None


_convnext_block.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(_convnext_block_backward)


def _flops(x, parameters, patch_to_row, *_):
    return 2 * flops_of_linear(x, parameters[4]) + flops_of_dwconv(x, patch_to_row)


def _flops_of_gradients(grad, x, parameters, patch_to_row, *rest):
    frozen = rest[-1]
    return (1 if frozen else 2) * _flops(x, parameters, patch_to_row)


counted("convnext_block", _flops)
counted("convnext_block_backward", _flops_of_gradients)


def _keeps_hidden(x: Tensor, differentiated: bool) -> bool:
    """Whether pwconv1's output is kept for the backward pass."""
    return differentiated and kernels.load("convnext_block", x.device).keeps_hidden(x.shape[-1])


def _check_parameters(x: Tensor, parameters: list[Tensor]) -> None:
    dwconv_weight, dwconv_bias, norm_weight, norm_bias, *rest = parameters
    if any(p.device != x.device for p in parameters):
        raise ValueError(f"all parameters must be on {x.device}")
    check_depthwise_weight(dwconv_weight, x)
    for name, row in {"dwconv_bias": dwconv_bias, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        check_row(name, row, x)
    channels, hidden = x.shape[3], len(rest[0])
    shapes = {
        "pwconv1_weight": (hidden, channels),
        "pwconv1_bias": (hidden,),
        "gamma": (hidden,),
        "beta": (hidden,),
        "pwconv2_weight": (channels, hidden),
        "pwconv2_bias": (channels,),
    }
    for (name, shape), parameter in zip(shapes.items(), rest, strict=True):
        if (parameter.flatten() if name in ("gamma", "beta") else parameter).shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(parameter.shape)}")
