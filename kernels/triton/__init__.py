"""The Triton kernels as functions on contiguous GPU tensors; what is computed is said in the file of the same name.

`slot`, `index` and `offsets` are `masking.VisiblePatches`'; features hold whole images, whose first patch is number
`first` of the batch. Sums over all positions are added to sums that start from `zero_sums`. They are taken in an order
that is the same for the same shapes and tiles. No function waits for the device.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from sparse_fcmae.kernels.triton import block_dwconv as _conv
from sparse_fcmae.kernels.triton import gelu_grn as _grn
from sparse_fcmae.kernels.triton import layer_norm as _norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of features
ON_HOST = False  # what tensors hold can't be read without waiting for a device
CAPABILITY = (8, 0)  # the least, of a CUDA device
PARTIAL = 1 << 16  # elements that partial sums have of each quantity: enough programs to fill a GPU
POSITIONS = 128  # that a program of gelu_grn takes of an image, or more where
MOST_PROGRAMS = 4096  # would not do


def unusable(device: torch.device) -> str | None:
    """Why the kernels can't run on a device, in one line; None where they can."""
    if device.type not in ("cuda", "xpu"):
        return f"there are no native kernels for {device.type}"
    if not torch.get_device_module(device).is_available():
        return f"there is no {device.type} device"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the Triton kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None


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

    x [T, S, S, C] and out are each of DTYPES, residual is as out, all else float32: taps [49, C], bias [C].
    """
    blocks, side, _, channels = x.shape
    place = (slot.contiguous(), index[first:].contiguous())
    tensors = (x, taps, bias, *norm, residual, *place, convolved, out)
    sizes = {"C": channels, "S": side, "BLOCK_C": triton.next_power_of_2(channels)}
    grid = lambda tile: (triton.cdiv(blocks * side, tile["R"]),)  # noqa: E731
    launch(_conv.block_dwconv_kernel, grid, *tensors, blocks, first, *_grid_of(slot), **sizes)
    return out


def block_dwconv_weight(x: Tensor, grad: Tensor, slot: Tensor, index: Tensor, sums: Tensor, *, first: int = 0) -> None:
    """Adds the gradients of the taps, then of the bias, to sums [1, 50, C], for grad as x, of DTYPES."""
    blocks, side, _, channels = x.shape
    lines = blocks * side
    programs, per_program = _shares(lines, 8, PARTIAL // channels)
    partial = x.new_empty(programs, *sums.shape[1:], dtype=torch.float32)
    tensors = (x, grad, slot.contiguous(), index[first:].contiguous(), partial)
    grid = lambda tile: (triton.cdiv(channels, tile["BLOCK_C"]), programs)  # noqa: E731
    sizes = (blocks, first, *_grid_of(slot), per_program)
    launch(_conv.block_dwconv_weight_kernel, grid, *tensors, *sizes, C=channels, S=side)
    sums += partial.sum(0)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, tile: int = 1) -> Tensor:
    """out [T, S / tile, S / tile, tile * tile * C] of x [T, S, S, C], each of DTYPES; all else float32."""
    blocks, side, _, channels = x.shape
    positions = blocks * side * side
    sizes = {"C": channels, "S": side, "TILE": tile, "BLOCK_C": triton.next_power_of_2(channels)}
    grid = lambda tile: (triton.cdiv(positions, tile["R"]),)  # noqa: E731
    launch(_norm.layer_norm_kernel, grid, x, weight, bias, out, positions, **sizes)
    return out


def layer_norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, grad_x: Tensor, sums: Tensor, *, tile: int = 1
) -> Tensor:
    """grad_x, which may be x; adds the gradients of weight and bias to sums [1, 2, C]."""
    blocks, side, _, channels = x.shape
    positions = blocks * side * side
    programs, per_program = _shares(positions, 32, 2 * PARTIAL // channels)
    partial = x.new_empty(programs, *sums.shape[1:], dtype=torch.float32)
    sizes = {"C": channels, "S": side, "TILE": tile, "BLOCK_C": triton.next_power_of_2(channels)}
    tensors = (x, grad, weight, grad_x, partial)
    launch(_norm.layer_norm_backward_kernel, (programs,), *tensors, positions, per_program, **sizes)
    sums += partial.sum(0)
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
    """out, which may be x, and norm [B, H], for the backward pass; x [N, H] of DTYPES.

    bias, which is added to x, gamma and beta [H] are float32; offsets [B + 1] count positions.
    """
    partial, grid = _passes(x, offsets)
    scale, channels = torch.empty_like(norm), x.shape[-1]
    launch(_grn.squares_kernel, grid, x, bias, offsets, partial, H=channels)
    launch(_grn.response_kernel, (len(norm),), partial.sum(1), gamma, norm, scale, H=channels)
    launch(_grn.scale_kernel, grid, x, bias, scale, beta, offsets, out, H=channels)
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
    slope: Tensor | None = None,
    bias: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """grad_x, which may be grad, and once more the forward pass's out, which may be x; slope is not used.

    Adds the gradients of bias (the sum of grad_x over all positions), gamma and beta to sums, each [H].
    """
    products, grid = _passes(x, offsets)
    channels, totals = x.shape[-1], torch.empty_like(products)
    scale, pull, grad_gamma = (torch.empty_like(norm) for _ in range(3))
    launch(_grn.products_kernel, grid, grad, x, bias, offsets, products, totals, H=channels)
    sums[2].add_(totals.sum((0, 1)))
    launch(_grn.pull_kernel, (len(norm),), products.sum(1), gamma, norm, scale, pull, grad_gamma, H=channels)
    sums[1].add_(grad_gamma.sum(0))
    tensors = (grad, x, bias, scale, pull, beta, offsets, grad_x, out, totals)
    launch(_grn.unscale_kernel, grid, *tensors, H=channels)
    sums[0].add_(totals.sum((0, 1)))
    return grad_x


def zero_sums(*shape: int, like: Tensor) -> Tensor:
    """Zeros [1, ...], float32, on the device of `like`."""
    return like.new_zeros(1, *shape, dtype=torch.float32)


def launch(kernel: Any, grid: Any, *arguments: Any, **sizes: int) -> None:
    """Launches a kernel on the device of its first argument, which need not be the current one.

    Tuned kernels get as their last argument the magnitude of this, by which their tiles are chosen too.
    """
    device = arguments[0].device
    if isinstance(kernel, triton.runtime.Autotuner):
        arguments = (*arguments, arguments[0].numel().bit_length())
    if device.type == "cpu":  # interpreted
        kernel[grid](*arguments, **sizes)
        return
    with torch.get_device_module(device).device(device):
        kernel[grid](*arguments, **sizes)


def _grid_of(slot: Tensor) -> tuple[int, int]:
    return slot.shape[1] - 6, slot.shape[2] - 6


def _passes(x: Tensor, offsets: Tensor) -> tuple[Tensor, Any]:
    """Partial sums [B, programs, H] and the grid of gelu_grn's passes, for images of about the same size."""
    images, channels = len(offsets) - 1, x.shape[-1]
    programs = max(1, min(MOST_PROGRAMS, triton.cdiv(len(x), max(1, images) * POSITIONS)))
    partial = x.new_empty(images, programs, channels, dtype=torch.float32)
    return partial, lambda tile: (images, programs, triton.cdiv(channels, tile["BLOCK_H"]))


def _shares(items: int, least: int, programs: int) -> tuple[int, int]:
    """How many programs share the items, at most `programs`, and how many each takes, `least` or more."""
    per_program = max(least, triton.cdiv(items, max(1, programs)))
    return triton.cdiv(items, per_program), per_program
