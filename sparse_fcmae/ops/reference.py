"""The specification of the ops in plain PyTorch: any device, any floating dtype, differentiable by autograd.

Kernels are tested against these functions in float64, and the `torch` backend runs them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.kernels.constants import EPS, HALO, SIDES
from sparse_fcmae.kernels.parameters import grid_of


def block_dwconv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Submanifold 7x7 depthwise convolution by way of a dense canvas that is zero where masked: `ops.block_dwconv`."""
    _, side, _, channels = x.shape
    batch, (rows, cols) = patch_to_row.shape[0], grid_of(patch_to_row)
    canvas = x.new_zeros(batch * rows * cols, side, side, channels).index_copy(0, row_to_patch, x)
    canvas = canvas.view(batch, rows, cols, side, side, channels).transpose(2, 3)
    canvas = canvas.reshape(batch, rows * side, cols * side, channels).permute(0, 3, 1, 2)
    out = F.conv2d(canvas, weight, bias, padding=HALO, groups=channels).permute(0, 2, 3, 1)
    out = out.reshape(batch, rows, side, cols, side, channels).transpose(2, 3)
    out = out.reshape(batch * rows * cols, side, side, channels)[row_to_patch]
    return out if norm_weight is None else layer_norm(out, norm_weight, norm_bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, tile: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the channels, then windows of tile x tile positions side by side: `ops.layer_norm`."""
    patches, side, _, channels = x.shape
    out = F.layer_norm(x, (channels,), weight, bias, EPS).to(dtype or x.dtype)
    windows = out.view(patches, side // tile, tile, side // tile, tile, channels).transpose(2, 3)
    return windows.reshape(patches, side // tile, side // tile, tile * tile * channels)


def normalise(pixels: Tensor, statistics: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels [..., C, H, W] in a floating dtype: as they are, or less mean and over deviation, statistics [2, C].

    In the latter case a pixel that is not finite is missing, and becomes 0, its channel's mean. int32 is computed in
    float64, as float32 can't hold it.
    """
    if statistics is None:
        return pixels.to(dtype)
    mean, deviation = statistics.to(torch.float64 if pixels.dtype == torch.int32 else dtype)[..., None, None]
    return ((pixels.to(mean.dtype) - mean) / deviation).to(dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def patches_of(pixels: Tensor, rows: Tensor, side: int) -> Tensor:
    """The patches at flat positions in [B, H / side, W / side] of images [B, C, H, W]: [N, C, side, side]."""
    grid = (pixels.shape[2] // side, pixels.shape[3] // side)
    image, row, col = rows // (grid[0] * grid[1]), rows // grid[1] % grid[0], rows % grid[1]
    return pixels.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))[image, :, row, :, col]


def patch_windows(
    pixels: Tensor, rows: Tensor, statistics: Tensor | None, kernel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The windows of a convolution whose stride is its kernel size, at the patches `rows`: [N, 8, 8, k * k * C].

    A window's pixels are in (row, column, channel) order.
    """
    side = SIDES[0]
    patches = normalise(patches_of(pixels, rows, side * kernel), statistics, dtype)
    windows = patches.unflatten(3, (side, kernel)).unflatten(2, (side, kernel)).permute(0, 2, 4, 3, 5, 1)
    return windows.reshape(len(rows), side, side, kernel * kernel * pixels.shape[1])


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    rows: Tensor,
    statistics: Tensor | None = None,
) -> Tensor:
    """The stem at the patches `rows`: `ops.patch_embed`."""
    windows = patch_windows(pixels, rows, statistics, weight.shape[2], weight.dtype)
    return layer_norm(F.linear(windows, weight.permute(0, 2, 3, 1).flatten(1), bias), norm_weight, norm_bias)


def patch_errors(
    prediction: Tensor, pixels: Tensor, rows: Tensor, statistics: Tensor | None = None, *, normalised: bool = True
) -> Tensor:
    """The mean squared error of the predictions of the patches `rows`: `ops.patch_errors`."""
    side, dtype = math.isqrt(prediction.shape[1] // pixels.shape[1]), accumulator(prediction)
    patches = patches_of(pixels, rows, side)
    target = normalise(patches, statistics, dtype).permute(0, 2, 3, 1).flatten(1)
    missing = statistics is not None and pixels.is_floating_point()
    recorded = patches.isfinite().permute(0, 2, 3, 1).flatten(1) if missing else torch.ones_like(target)
    count = recorded.sum(1, keepdim=True)
    if normalised:
        deviation = (target - target.sum(1, keepdim=True) / count.clamp_min(1)) * recorded
        variance = deviation.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
        target = deviation / (variance + EPS).sqrt()
    squares = ((prediction.to(dtype) - target) * recorded).square()
    return squares.sum(1) / count[:, 0].clamp_min(1)


def gelu_grn(x: Tensor, gamma: Tensor, image_offsets: Tensor, beta: Tensor | None = None) -> Tensor:
    """GELU and global response normalisation over each image's positions: `ops.gelu_grn`."""
    h = F.gelu(x)
    images = torch.arange(len(image_offsets) - 1, device=h.device)
    image_of = images.repeat_interleave(image_offsets.diff(), output_size=len(h))
    of_patches = h.to(accumulator(h)).square().sum((1, 2))
    squares = of_patches.new_zeros(len(images), h.shape[3]).index_add(0, image_of, of_patches)
    return grn(h, grn_scale(squares, gamma)[image_of][:, None, None], beta)


def grn_scale(squares: Tensor, gamma: Tensor) -> Tensor:
    """What global response normalisation multiplies each channel by (ConvNeXt V2, section 3.2).

    squares [..., H]: each channel's sum of squares over the positions that are pooled. gamma [H].
    """
    nonzero = squares != 0  # the norm's gradient at zero is taken as zero
    response = torch.where(nonzero, squares, 1).sqrt() * nonzero
    return 1 + gamma * response / (response.mean(-1, keepdim=True) + EPS)


def grn(h: Tensor, scale: Tensor, beta: Tensor | None) -> Tensor:
    """h * scale + beta, of h's dtype; the scale is broadcast over the positions that it was pooled over."""
    scale = scale.to(h.dtype)
    return h * scale if beta is None else torch.addcmul(beta.to(h.dtype), h, scale)


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over x are taken in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
