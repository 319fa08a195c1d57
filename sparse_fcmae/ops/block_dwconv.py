"""Depthwise 7x7 convolution over visible blocks: the C++ kernel as a `torch.library` op with autograd."""

import torch
from torch import Tensor

from sparse_fcmae.kernels import cpu

TAPS = 49


def block_dwconv(x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, index: Tensor) -> Tensor:
    """Submanifold 7x7 depthwise convolution over the visible patches of a batch (ConvNeXt V2, section 3.1).

    Each output is the sum over the window's visible positions alone: equal to a dense convolution, padding 3, of the
    features with zeros where masked, taken at the visible positions.

    x: [T, S, S, C] float32 or bfloat16 on the CPU, S one of 8, 4, 2, 1. weight: [C, 1, 7, 7]. bias: [C] or None.
    slot: int32 [B, rows + 6, cols + 6], index: int64 [T], as in `masking.VisiblePatches`.
    Returns [T, S, S, C] of x's dtype; sums are float32. Under autocast x is cast to the autocast dtype.
    Differentiable once in x, weight and bias. Raises ValueError for other shapes, dtypes or devices.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _block_dwconv(x, weight, bias, slot, index)


@torch.library.custom_op("sparse_fcmae::block_dwconv", mutates_args=())
def _block_dwconv(x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, index: Tensor) -> Tensor:
    _check(x, weight, bias, slot, index)
    return _convolve(x, _taps(weight), None if bias is None else bias.float().contiguous(), slot, index)


@_block_dwconv.register_fake
def _(x, weight, bias, slot, index):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("sparse_fcmae::block_dwconv_input_grad", mutates_args=())
def _input_grad(grad: Tensor, weight: Tensor, slot: Tensor, index: Tensor) -> Tensor:
    return _convolve(grad, _taps(weight).flip(0), None, slot, index)


@_input_grad.register_fake
def _(grad, weight, slot, index):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@torch.library.custom_op("sparse_fcmae::block_dwconv_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, x: Tensor, slot: Tensor, index: Tensor) -> Tensor:
    """float32 [50, C]: the gradients of the 49 taps, then of the bias."""
    x, grad = x.contiguous(), grad.contiguous()
    shape = (TAPS + 1, x.shape[-1])
    partial = torch.empty(torch.get_num_threads(), *shape, dtype=torch.float32)
    out = torch.empty(shape, dtype=torch.float32)
    cpu.call("block_dwconv_weight", x, grad, *_geometry(x, slot, index), partial, out)
    return out


@_weight_grad.register_fake
def _(grad, x, slot, index):
    return grad.new_empty(TAPS + 1, x.shape[-1], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, bias, slot, index = inputs
    ctx.save_for_backward(x, weight, slot, index)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    x, weight, slot, index = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _input_grad(grad, weight, slot, index)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        sums = _weight_grad(grad, x, slot, index)
        grad_weight = sums[:TAPS].t().reshape(weight.shape).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else sums[TAPS].to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None


_block_dwconv.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, slot: Tensor, index: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"block_dwconv takes float32 or bfloat16 on the CPU, not {x.dtype} on {x.device}")
    if x.dim() != 4 or x.shape[1] != x.shape[2] or x.shape[1] not in (8, 4, 2, 1):
        raise ValueError(f"x must be [T, S, S, C] with S one of 8, 4, 2, 1, not {tuple(x.shape)}")
    if weight.shape != (x.shape[3], 1, 7, 7):
        raise ValueError(f"weight must be [{x.shape[3]}, 1, 7, 7], not {tuple(weight.shape)}")
    if bias is not None and bias.shape != x.shape[3:]:
        raise ValueError(f"bias must be [{x.shape[3]}], not {tuple(bias.shape)}")
    if slot.dtype != torch.int32 or slot.dim() != 3 or slot.device != x.device:
        raise ValueError(f"slot must be int32 [B, rows + 6, cols + 6] on {x.device}")
    if index.dtype != torch.int64 or index.shape != x.shape[:1] or index.device != x.device:
        raise ValueError(f"index must be int64 [{x.shape[0]}] on {x.device}")
    patches = slot.shape[0] * (slot.shape[1] - 6) * (slot.shape[2] - 6)
    if len(index) and not (0 <= index[0] <= index[-1] < patches and slot.max() < len(index)):
        raise ValueError("slot and index are not of one mask")


def _taps(weight: Tensor) -> Tensor:
    """[C, 1, 7, 7] as the kernels read it: float32 [49, C]."""
    return weight.flatten(1).t().float()


def _convolve(x: Tensor, taps: Tensor, bias: Tensor | None, slot: Tensor, index: Tensor) -> Tensor:
    x, taps = x.contiguous(), taps.contiguous()
    out = torch.empty_like(x)
    cpu.call("block_dwconv", x, taps, bias, *_geometry(x, slot, index), out)
    return out


def _geometry(x: Tensor, slot: Tensor, index: Tensor) -> tuple:
    blocks, side, _, channels = x.shape
    grid = (slot.shape[1] - 6, slot.shape[2] - 6)
    return slot.contiguous(), index.contiguous(), blocks, *grid, side, channels, int(x.dtype == torch.bfloat16)
