"""Images' pixels as the C++ kernels take them: pixels.h."""

from math import prod

import torch
from torch import Tensor

from sparse_fcmae.kernels.cpu.library import INT, POINTER
from sparse_fcmae.kernels.parameters import PIXEL_DTYPES

PIXELS = (POINTER, INT, POINTER, POINTER)  # the address, its dtype's number, the layout, mean and deviation


def arguments_of(pixels: Tensor, statistics: Tensor | None, side: int) -> tuple[Tensor, int, Tensor, Tensor | None]:
    """What PIXELS says of images [B, C, H, W] in patches of `side`, however they lie in memory."""
    _, channels, height, width = pixels.shape
    grid = (height // side, width // side)
    layout = torch.tensor([*pixels.stride(), channels, side, grid[1], prod(grid)])
    return pixels, PIXEL_DTYPES.index(pixels.dtype), layout, statistics
