"""The error of each masked patch's prediction on the CPU: patch_errors.cpp."""

from torch import Tensor

from sparse_fcmae.kernels.cpu.library import INT, LONG, POINTER, TENSOR, Kernel, bf16
from sparse_fcmae.kernels.cpu.pixels import PIXELS, arguments_of

_forward = Kernel("patch_errors", PIXELS, POINTER, LONG, INT, TENSOR, POINTER)
_backward = Kernel("patch_errors_backward", POINTER, PIXELS, POINTER, LONG, INT, TENSOR, POINTER)


def patch_errors(
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor,
    statistics: Tensor | None,
    errors: Tensor,
    *,
    side: int,
    normalised: bool,
) -> Tensor:
    """Writes to `errors` [M] and returns it; see `ops.patch_errors`. statistics: float64."""
    images = arguments_of(pixels, statistics, side)
    _forward(*images, rows, len(rows), int(normalised), prediction, bf16(prediction), errors)
    return errors


def patch_errors_backward(
    grad_errors: Tensor,
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor,
    statistics: Tensor | None,
    grad: Tensor,
    *,
    side: int,
    normalised: bool,
) -> Tensor:
    """Writes the gradient of `prediction` to `grad`, of its shape and dtype, and returns it."""
    images = arguments_of(pixels, statistics, side)
    _backward(grad_errors, *images, rows, len(rows), int(normalised), prediction, bf16(prediction), grad)
    return grad
