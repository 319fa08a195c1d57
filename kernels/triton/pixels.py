"""Reads images' pixels, of whatever dtype and order in memory, as normalised numbers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def patch_address(pixels, rows, t, image, row, column, SIDE: tl.constexpr, COLS: tl.constexpr, PATCHES: tl.constexpr):
    """Where the patch of rows[t] begins, whose number is its flat position in [B, rows, cols]."""
    flat = tl.load(rows + t)
    place = flat % PATCHES
    return pixels + flat // PATCHES * image + place // COLS * SIDE * row + place % COLS * SIDE * column


@triton.jit
def read_pixels(
    patch,
    statistics,
    inside,
    y,
    x,
    c,
    channel,
    row,
    column,
    C: tl.constexpr,
    NORMALISES: tl.constexpr,
    CAN_MISS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The values at rows y, columns x and channels c of a patch, float32, and 1 where they are recorded, else 0.

    NORMALISES: by `statistics` [2, C], mean and deviation. CAN_MISS: a pixel that is not finite is missing, and 0.
    WIDE: computes in float64, as float32 can't hold an int32.
    """
    pixel = tl.load(patch + y * row + x * column + c * channel, mask=inside, other=0)
    value = pixel.to(tl.float64) if WIDE else pixel.to(tl.float32)
    recorded = tl.where(inside, 1.0, 0.0)
    if NORMALISES:
        mean = tl.load(statistics + c, mask=inside, other=0.0).to(value.dtype)
        deviation = tl.load(statistics + C + c, mask=inside, other=1.0).to(value.dtype)
        if CAN_MISS:
            recorded = tl.where(tl.abs(value) < INFINITY, recorded, 0.0)
        value = tl.div_rn(value - mean, deviation) if not WIDE else (value - mean) / deviation
        if CAN_MISS:
            value = tl.where(tl.abs(value) < INFINITY, value, 0.0)
    return tl.where(inside, value.to(tl.float32), 0.0), recorded


def arguments_of(
    pixels: Tensor, statistics: Tensor | None, side: int
) -> tuple[Tensor, Tensor, list[int], dict[str, Any]]:
    """What a kernel is told of images [B, C, H, W]: pixels, statistics, strides, and the constants by their names."""
    _, channels, height, width = pixels.shape
    grid = (height // side, width // side)
    normalises = statistics is not None
    sizes = {
        "C": channels,
        "SIDE": side,
        "COLS": grid[1],
        "PATCHES": grid[0] * grid[1],
        "NORMALISES": normalises,
        "CAN_MISS": normalises and pixels.is_floating_point(),
        "WIDE": normalises and pixels.dtype == torch.int32,
    }
    return pixels, statistics if normalises else pixels, list(pixels.stride()), sizes
