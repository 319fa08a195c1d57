"""The error of each masked patch's prediction: `ops.patch_errors`. A program has a patch, which it reads three times.

The first time brings the pixels into the caches.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.kernels.triton.launching import launch
from sparse_fcmae.kernels.triton.pixels import arguments_of, patch_address, read_pixels

TARGET_EPS = tl.constexpr(EPS)
BLOCK, WARPS = 1024, 8


@triton.jit
def _values(
    patch,
    statistics,
    i,
    channel,
    row,
    column,
    C: tl.constexpr,
    SIDE: tl.constexpr,
    NORMALISES: tl.constexpr,
    CAN_MISS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Values i of a patch in (row, column, channel) order, and 1 where they are recorded, else 0."""
    y, x, c = i // (SIDE * C), i // C % SIDE, i % C
    inside = i < SIDE * SIDE * C
    return read_pixels(patch, statistics, inside, y, x, c, channel, row, column, C, NORMALISES, CAN_MISS, WIDE)


@triton.jit
def patch_errors_kernel(
    prediction,
    pixels,
    statistics,
    rows,
    given,
    result,
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
    NORMALISED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result [M]: the errors; or where BACKWARD the gradient of prediction, from `given` [M], that of the errors."""
    t = tl.program_id(0).to(tl.int64)
    patch = patch_address(pixels, rows, t, image, row, column, SIDE, COLS, PATCHES)
    SIZE: tl.constexpr = SIDE * SIDE * C
    count, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value, recorded = _values(patch, statistics, i, channel, row, column, C, SIDE, NORMALISES, CAN_MISS, WIDE)
        count += recorded
        total += value
    n = tl.sum(count, 0)
    mean = tl.sum(total, 0) * 0.0
    scale = mean + 1.0
    if NORMALISED:
        mean = tl.sum(total, 0) / tl.maximum(n, 1.0)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value, recorded = _values(patch, statistics, i, channel, row, column, C, SIDE, NORMALISES, CAN_MISS, WIDE)
            deviation = (value - mean) * recorded
            squares += deviation * deviation
        scale = tl.rsqrt(tl.sum(squares, 0) / tl.maximum(n - 1.0, 1.0) + TARGET_EPS)
    error = tl.zeros([BLOCK], tl.float32)
    factor = scale
    if BACKWARD:
        factor = 2.0 * tl.load(given + t) / tl.maximum(n, 1.0)
    for start in range(0, SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value, recorded = _values(patch, statistics, i, channel, row, column, C, SIDE, NORMALISES, CAN_MISS, WIDE)
        p = tl.load(prediction + t * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
        difference = (p - (value - mean) * scale) * recorded
        if BACKWARD:
            tl.store(result + t * SIZE + i, difference * factor, mask=i < SIZE)
        else:
            error += difference * difference
    if not BACKWARD:
        tl.store(result + t, tl.sum(error, 0) / tl.maximum(n, 1.0))


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
    return _run(prediction, pixels, rows, statistics, errors, errors, side, normalised, backward=False)


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
    return _run(prediction, pixels, rows, statistics, grad_errors, grad, side, normalised, backward=True)


def _run(
    prediction: Tensor,
    pixels: Tensor,
    rows: Tensor,
    statistics: Tensor | None,
    given: Tensor,
    result: Tensor,
    side: int,
    normalised: bool,
    backward: bool,
) -> Tensor:
    *images, strides, sizes = arguments_of(pixels, statistics, side)
    sizes |= {"NORMALISED": normalised, "BACKWARD": backward, "num_warps": WARPS}
    sizes["BLOCK"] = min(BLOCK, triton.next_power_of_2(prediction.shape[1]))
    if len(rows):
        launch(patch_errors_kernel, (len(rows),), prediction, *images, rows, given, result, *strides, **sizes)
    return result
