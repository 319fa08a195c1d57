"""The stem on the CPU: a few patches at a time, so that their windows and features stay in the caches."""

import torch
from torch import Tensor

from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.kernels.cpu import zero_sums
from sparse_fcmae.kernels.cpu.layer_norm import layer_norm, layer_norm_backward
from sparse_fcmae.kernels.cpu.library import LONG, POINTER, TENSOR, Kernel, bf16
from sparse_fcmae.kernels.cpu.pixels import PIXELS, arguments_of
from sparse_fcmae.kernels.cpu.products import add_weight_gradient, linear
from sparse_fcmae.kernels.cpu.scratch import buffer
from sparse_fcmae.kernels.parameters import row_of, stem_gradient_of, stem_matrix_of

_windows = Kernel("patch_windows", PIXELS, POINTER, LONG, LONG, TENSOR)
SIDE = SIDES[0]
CHUNK_BYTES = 1 << 20  # of windows and features of a chunk


def patch_windows(pixels: Tensor, rows: Tensor, statistics: Tensor | None, out: Tensor, *, kernel: int) -> Tensor:
    """Writes the windows of the patches `rows` to `out` [T, 8, 8, k * k * C], k the kernel's side, and returns it.

    out is float32 or bfloat16; a window's pixels are in (row, column, channel) order. statistics: float64.
    """
    images = arguments_of(pixels, statistics, SIDE * kernel)
    _windows(*images, rows, len(rows), kernel, out, bf16(out))
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
    matrix, norm = stem_matrix_of(weight, dtype), (row_of(norm_weight), row_of(norm_bias))
    bias = bias.to(dtype)
    out = norm_weight.new_empty(len(rows), SIDE, SIDE, len(weight))
    kept = matrix.new_empty(len(rows) * SIDE**2 if keep else 0, matrix.shape[1])
    for chunk in _chunks(rows, matrix):
        windows = (
            kept.view(len(rows), -1)[chunk].view(-1, matrix.shape[1]) if keep else _empty_windows(rows[chunk], matrix)
        )
        patch_windows(pixels, rows[chunk], statistics, windows, kernel=weight.shape[2])
        z = _convolved(windows, matrix, bias)
        layer_norm(z.view(out[chunk].shape), *norm, out[chunk])
    return out, kept


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
    matrix, scale = stem_matrix_of(weight, dtype), row_of(norm_weight)
    in_dtype = bias.to(dtype)
    norm_sums = zero_sums(2, len(weight), like=grad)
    grad_bias = torch.zeros(len(weight), dtype=torch.float32)
    grad_matrix = None
    for chunk in _chunks(rows, matrix):
        if pixels is None:
            windows = kept.view(len(rows), -1)[chunk].view(-1, matrix.shape[1])
        else:
            windows = _empty_windows(rows[chunk], matrix)
            patch_windows(pixels, rows[chunk], statistics, windows, kernel=weight.shape[2])
        z = _convolved(windows, matrix, in_dtype)
        features = z.view(grad[chunk].shape)
        layer_norm_backward(features, grad[chunk], scale, features, norm_sums)
        grad_bias += z.sum(0, dtype=torch.float32)
        grad_matrix = add_weight_gradient(grad_matrix, z, windows)
    grad_matrix = torch.zeros(matrix.shape, dtype=torch.float32) if grad_matrix is None else grad_matrix
    return stem_gradient_of(grad_matrix, weight), grad_bias.to(bias.dtype), norm_sums.sum(0)


def _chunks(rows: Tensor, matrix: Tensor) -> list[slice]:
    patches = max(1, CHUNK_BYTES // (sum(matrix.shape) * matrix.itemsize * SIDE * SIDE))
    return [slice(first, first + patches) for first in range(0, len(rows), patches)]


def _empty_windows(rows: Tensor, matrix: Tensor) -> Tensor:
    """Scratch memory for the windows of some patches: [N, k * k * C]."""
    return buffer("windows", len(rows) * SIDE * SIDE, matrix.shape[1], matrix.dtype)


def _convolved(windows: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """The convolution of windows, [N, D] in scratch memory."""
    return linear(windows, matrix, out=buffer("z", len(windows), len(matrix), matrix.dtype), bias=bias)
