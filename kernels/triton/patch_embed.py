"""The stem on a GPU: the whole batch at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.kernels.parameters import row_of, stem_gradient_of, stem_matrix_of
from sparse_fcmae.kernels.triton import zero_sums
from sparse_fcmae.kernels.triton.launching import launch
from sparse_fcmae.kernels.triton.layer_norm import layer_norm, layer_norm_backward
from sparse_fcmae.kernels.triton.pixels import arguments_of, patch_address, read_pixels

SIDE = SIDES[0]
BLOCK = 1024


@triton.jit
def patch_windows_kernel(
    out,
    pixels,
    statistics,
    rows,
    image,
    channel,
    row,
    column,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    COLS: tl.constexpr,
    PATCHES: tl.constexpr,
    NORMALISES: tl.constexpr,
    CAN_MISS: tl.constexpr,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [T, S, S, K * K * C]: windows of K x K pixels, which tile the patches, in (row, column, channel) order."""
    t = tl.program_id(0).to(tl.int64)
    patch = patch_address(pixels, rows, t, image, row, column, SIDE, COLS, PATCHES)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    window, y, x = i // (K * K * C), i // (K * C) % K, i // C % K
    y += window // (SIDE // K) * K
    x += window % (SIDE // K) * K
    inside = i < SIDE * SIDE * C
    value, _ = read_pixels(patch, statistics, inside, y, x, i % C, channel, row, column, C, NORMALISES, CAN_MISS, WIDE)
    tl.store(out + t * SIDE * SIDE * C + i, value, mask=inside)


def patch_windows(pixels: Tensor, rows: Tensor, statistics: Tensor | None, out: Tensor, *, kernel: int) -> Tensor:
    """Writes the windows of the patches `rows` to `out` [T, 8, 8, k * k * C], k the kernel's side, and returns it.

    A window's pixels are in (row, column, channel) order. statistics: float64.
    """
    *images, strides, sizes = arguments_of(pixels, statistics, SIDE * kernel)
    values = (SIDE * kernel) ** 2 * pixels.shape[1]
    if len(rows):
        grid = (len(rows), triton.cdiv(values, BLOCK))
        launch(patch_windows_kernel, grid, out, *images, rows, *strides, **sizes, K=kernel, BLOCK=BLOCK)
    return out


def patch_embed(
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
    """The forward pass: see `ops.patch_embed`."""
    windows = _windows_of(pixels, rows, statistics, weight, dtype)
    z = _convolved(windows, weight, bias)
    out = norm_weight.new_empty(z.shape)
    return layer_norm(z, row_of(norm_weight), row_of(norm_bias), out), windows if keep else windows.new_empty(
        0, windows.shape[1]
    )


def patch_embed_backward(
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
    """The gradients of weight and bias, and of the norm's weight and bias, float32 [2, D]."""
    windows = kept if pixels is None else _windows_of(pixels, rows, statistics, weight, dtype)
    z = _convolved(windows, weight, bias)
    sums = zero_sums(2, len(weight), like=grad)
    layer_norm_backward(z, grad, row_of(norm_weight), z, sums)
    z = z.flatten(0, 2)
    matrix = torch.mm(z.t(), windows, out=z.new_empty(len(weight), windows.shape[1]))
    return stem_gradient_of(matrix, weight), z.sum(0, dtype=torch.float32).to(bias.dtype), sums.sum(0)


def _windows_of(pixels: Tensor, rows: Tensor, statistics: Tensor | None, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The patches' windows: [T * 64, k * k * C]."""
    windows = weight.new_empty(len(rows) * SIDE * SIDE, weight[0].numel(), dtype=dtype)
    return patch_windows(pixels, rows, statistics, windows, kernel=weight.shape[2])


def _convolved(windows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of windows: [T, 8, 8, D]."""
    matrix = stem_matrix_of(weight, windows.dtype)
    z = matrix.new_empty(len(windows) // SIDE**2, SIDE, SIDE, len(weight))
    torch.addmm(bias.to(windows.dtype), windows, matrix.t(), out=z.view(-1, len(weight)))
    return z
