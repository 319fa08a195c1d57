"""Mean and standard deviation of the channels, and pixels normalised with them."""

from functools import cache

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of values between 0 and 1


def channel_stats(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that images are normalised with.

    They are ImageNet's for 3 channels, and the means of these over its channels for any other number.
    """
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (sum(IMAGENET_MEAN) / 3,) * in_chans, (sum(IMAGENET_STD) / 3,) * in_chans


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W], normalised, on the same device."""
    mean, std = _stats_of_row(pixels.device, pixels.shape[-1], pixels.shape[-2])
    rows = pixels.flatten(2).float()  # in whole rows, as CPUs are slow at broadcasting along three channels
    return rows.sub_(mean).div_(std).view(pixels.shape).permute(0, 3, 1, 2)


@cache
def _stats_of_row(device: torch.device, channels: int, width: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a row of pixels, float32 [width * channels]. Made once, as making them waits for a GPU."""
    mean, std = (255 * torch.tensor(stats, device=device).repeat(width) for stats in channel_stats(channels))
    return mean, std
