"""Images of every dtype that pixels are stored in, for the tests of the ops that read them."""

import torch
from torch import Tensor

DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float16, torch.float32)
GREATEST = {torch.uint8: 255, torch.uint16: 65535, torch.int16: 32767, torch.int32: 2**31 - 1, torch.float16: 60000}


def make_pixels(
    dtype: torch.dtype,
    channels: int,
    side: int,
    *,
    channels_last: bool = True,
    missing: bool = True,
    device: str = "cpu",
) -> Tensor:
    """Two images of 2 x 3 patches of so many pixels, over the whole range of the dtype.

    Of floating ones some values are missing: all of patch 7, all but one of patch 8, a few of the others.
    """
    least = -GREATEST[dtype] if dtype in (torch.int16, torch.int32, torch.float16) else 0
    greatest = GREATEST.get(dtype, 1000)
    values = torch.rand(2, channels, 2 * side, 3 * side, dtype=torch.float64) * (greatest - least) + least
    pixels = values.to(dtype)
    if dtype.is_floating_point and missing:
        pixels[torch.rand(pixels.shape) < 0.1] = torch.nan
        pixels[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 1.0])
        pixels[1, :, :side, side : 3 * side] = torch.nan
        pixels[1, -1, side - 1, 3 * side - 1] = 7.0
    if channels_last:
        pixels = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return pixels.to(device)


def make_statistics(pixels: Tensor) -> Tensor:
    """A mean and a deviation for each channel, float64 [2, C], of the pixels' magnitude."""
    values = pixels.double().nan_to_num(0, 0, 0).abs().mean()
    mean, deviation = torch.rand(2, pixels.shape[1], dtype=torch.float64, device=pixels.device) + 0.5
    return torch.stack([mean * values, deviation * values])
