"""The depthwise convolution over visible patches on the CPU: block_dwconv.cpp."""

from torch import Tensor

from sparse_fcmae.kernels.cpu.library import INT, LONG, POINTER, TENSOR, Kernel, bf16
from sparse_fcmae.kernels.parameters import grid_of

PATCHES = (POINTER, POINTER, LONG, LONG, LONG, LONG, INT, LONG)  # what `_patches` gives
_forward = Kernel("block_dwconv", TENSOR, *[POINTER] * 5, PATCHES, POINTER, TENSOR)
_weight = Kernel("block_dwconv_weight", TENSOR, POINTER, PATCHES, POINTER)


def block_dwconv(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    residual: Tensor | None = None,
    convolved: Tensor | None = None,
) -> Tensor:
    """Writes convolution + residual to `out` and returns it.

    With norm = (weight, bias) `out` is the LayerNorm of the convolution instead, which itself goes to `convolved` if
    that is given. x [T, S, S, C] and out are float32 or bfloat16, each by itself; residual has out's dtype; all else is
    float32: taps [49, C], bias [C].
    """
    patches = _patches(x, patch_to_row, row_to_patch, first)
    _forward(x, bf16(x), taps, bias, *norm, residual, *patches, convolved, out, bf16(out))
    return out


def block_dwconv_weight(
    x: Tensor, grad: Tensor, patch_to_row: Tensor, row_to_patch: Tensor, sums: Tensor, *, first: int = 0
) -> None:
    """Adds the gradients of the taps, then of the bias, to sums [threads, 50, C]; grad is float32, shaped as x."""
    _weight(x, bf16(x), grad, *_patches(x, patch_to_row, row_to_patch, first), sums)


def _patches(x: Tensor, patch_to_row: Tensor, row_to_patch: Tensor, first: int) -> tuple[Tensor | int, ...]:
    count, side, _, channels = x.shape
    grid = grid_of(patch_to_row)
    return patch_to_row.contiguous(), row_to_patch.contiguous(), first, count, *grid, side, channels
