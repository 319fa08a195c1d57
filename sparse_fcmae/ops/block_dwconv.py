"""Depthwise 7x7 convolution over visible blocks, with LayerNorm behind it: the kernels as a `torch.library` op."""

import torch
from torch import Tensor

from sparse_fcmae import kernels

TAPS = 49


def block_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    index: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Submanifold 7x7 depthwise convolution over the visible patches of a batch (ConvNeXt V2, section 3.1).

    Each output is the sum over the window's visible positions alone: equal to a dense convolution, padding 3, of the
    features with zeros where masked, taken at the visible positions. With norm_weight and norm_bias [C] (both or
    neither) LayerNorm over the channels follows (eps 1e-6), and its input is computed again in the backward pass.

    x: [T, S, S, C] float32 or bfloat16, on a GPU also float16, S one of 8, 4, 2, 1. weight: [C, 1, 7, 7].
    bias: [C] or None. slot: int32 [B, rows + 6, cols + 6], index: int64 [T], as in `masking.VisiblePatches`.
    Returns [T, S, S, C] of x's dtype; sums are float32. Under autocast x is cast to the autocast dtype.
    Differentiable once in x and all parameters. Raises ValueError for other shapes, dtypes or devices; that slot and
    index are of one mask is not checked on a GPU, as it would have to be waited for.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _block_dwconv(x, weight, bias, slot, index, norm_weight, norm_bias)


@torch.library.custom_op("sparse_fcmae::block_dwconv", mutates_args=())
def _block_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    index: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    check_dwconv(x, weight, bias, slot, index, norm_weight, norm_bias)
    x, norm = x.contiguous(), (row_of(norm_weight), row_of(norm_bias))
    out = torch.empty_like(x)
    return kernels.of(x.device).block_dwconv(x, taps_of(weight), row_of(bias), slot, index, out, norm=norm)


@_block_dwconv.register_fake
def _(x, weight, bias, slot, index, norm_weight=None, norm_bias=None):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("sparse_fcmae::block_dwconv_backward", mutates_args=())
def _block_dwconv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x; of the 49 taps, then of the bias, float32 [50, C]; of the norm's weight and bias, [2, C].

    Where weight and bias are `frozen`, theirs are zeros.
    """
    x, taps, channels, ours = x.contiguous(), taps_of(weight), x.shape[-1], kernels.of(x.device)
    sums, norm_sums = (ours.zero_sums(n, channels, like=x) for n in (TAPS + 1, 2))
    if norm_weight is None:
        grad = grad.float().contiguous()
    else:
        y = ours.block_dwconv(x, taps, row_of(bias), slot, index, torch.empty_like(x, dtype=torch.float32))
        grad = ours.layer_norm_backward(y, grad.contiguous(), row_of(norm_weight), y, norm_sums)
    if not frozen:
        ours.block_dwconv_weight(x, grad, slot, index, sums)
    grad_x = ours.block_dwconv(grad, taps.flip(0), None, slot, index, torch.empty_like(x))
    return grad_x, sums.sum(0), norm_sums.sum(0)


@_block_dwconv_backward.register_fake
def _(grad, x, weight, bias, slot, index, norm_weight, norm_bias, frozen):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, *(x.new_empty(n, x.shape[-1], dtype=torch.float32) for n in (TAPS + 1, 2))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    _, weight, bias, _, _, norm_weight, norm_bias = ctx.saved_tensors
    frozen = not any(ctx.needs_input_grad[1:3])
    grad_x, sums, norm_sums = _block_dwconv_backward(grad, *ctx.saved_tensors, frozen)
    grad_weight = weight_gradient_of(sums, weight)
    rows = zip((sums[TAPS], *norm_sums), (bias, norm_weight, norm_bias), strict=True)
    grad_bias, *grad_norm = (None if like is None else row.to(like.dtype, copy=True) for row, like in rows)
    return grad_x, grad_weight, grad_bias, None, None, *grad_norm


_block_dwconv.register_autograd(_backward, setup_context=_setup_context)


def check_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    offsets: Tensor | None = None,
) -> None:
    """Raises ValueError where these are not `block_dwconv`'s arguments, or where offsets divide an image's patches."""
    kernels.check_dtype("block_dwconv", x.device, x.dtype)
    if x.dim() != 4 or x.shape[1] != x.shape[2] or x.shape[1] not in (8, 4, 2, 1):
        raise ValueError(f"x must be [T, S, S, C] with S one of 8, 4, 2, 1, not {tuple(x.shape)}")
    if weight.shape != (x.shape[3], 1, 7, 7):
        raise ValueError(f"weight must be [{x.shape[3]}, 1, 7, 7], not {tuple(weight.shape)}")
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias go together")
    for tensor in (weight, bias, norm_weight, norm_bias):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"all parameters must be on {x.device}, not {tensor.device}")
    for name, row in {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        if row is not None and row.shape != x.shape[3:]:
            raise ValueError(f"{name} must be [{x.shape[3]}], not {tuple(row.shape)}")
    if slot.dtype != torch.int32 or slot.dim() != 3 or min(slot.shape[1:]) < 6 or slot.device != x.device:
        raise ValueError(f"slot must be int32 [B, rows + 6, cols + 6] on {x.device}")
    if index.dtype != torch.int64 or index.shape != x.shape[:1] or index.device != x.device:
        raise ValueError(f"index must be int64 [{x.shape[0]}] on {x.device}")
    ours = kernels.of(x.device)
    if ours.ON_HOST and not ours.one_mask(slot, index, offsets):
        raise ValueError("slot, index and offsets are not of one mask")


def taps_of(weight: Tensor) -> Tensor:
    """[C, 1, 7, 7] as the kernels read it: float32 [49, C], contiguous."""
    return weight.flatten(1).t().float().contiguous()


def weight_gradient_of(sums: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `weight` [C, 1, 7, 7] from the kernels' [50, C]."""
    return sums[:TAPS].t().reshape(weight.shape).to(weight.dtype)


def row_of(parameter: Tensor | None) -> Tensor | None:
    """A parameter [C] as the kernels read it: float32, contiguous."""
    return None if parameter is None else parameter.float().contiguous()
