"""Fully convolutional masked autoencoder: sparse encoder, dense decoder, loss on the masked patches.

ConvNeXt V2 (Woo et al., 2023), section 3.1. The state dict has the official names.
"""

from copy import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends import resolve_backend
from sparse_fcmae.backends.patches import product_dtype
from sparse_fcmae.model.convnext import Block, SparseEncoder, init_weights, run_blocks
from sparse_fcmae.model.masking import num_visible_patches, random_mask
from sparse_fcmae.runtime.errors import UserError

TARGET_EPS = 1e-6  # added to the variance of a target patch


class FCMAEOutput(NamedTuple):
    """loss: float32 scalar. prediction: [B, L, P * P * C], a patch's pixels in (row, column, channel) order. mask: bool
    [B, H/P, W/P], True = masked."""

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class FCMAE(nn.Module):
    """Masks images, encodes their visible patches, predicts the pixels of the masked ones.

    mask_ratio: fraction of the patches that is masked. mask_patch_size: pixels, a multiple of the patch P; masks are
    drawn in squares of this side. mask_grid: masks are drawn on a grid of this many rows and columns instead.
    norm_pix_loss: each target patch is normalised by its own mean and variance. decoder_dim, decoder_depth: the
    decoder's width and blocks. The other arguments are `SparseEncoder`'s. Raises UserError for values that do not fit
    together.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        backend: str = "auto",
        mask_patch_size: int | None = None,
        mask_grid: int | None = None,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        stem_stride: int = 4,
        grn_scope: str = "image",
    ) -> None:
        super().__init__()
        shared = {"image_size": image_size, "in_chans": in_chans, "stem_stride": stem_stride, "grn_scope": grn_scope}
        self.encoder = SparseEncoder(name, backend=backend, **shared)
        self.patch_size = self.encoder.patch_size
        self.mask_ratio, self.mask_patch_size, self.mask_grid = mask_ratio, mask_patch_size, mask_grid
        self.norm_pix_loss = norm_pix_loss
        if decoder_dim < 1 or decoder_depth < 1:
            raise UserError("`decoder_dim` and `decoder_depth` must be at least 1")

        self.proj = nn.Conv2d(self.encoder.num_features, decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_dim) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_dim, self.patch_size**2 * in_chans, 1)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        self.num_visible(self.encoder.image_size)  # refuses what does not fit together

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_visible: int | None = None,
        recorded: Tensor | None = None,
    ) -> FCMAEOutput:
        """images: floating [B, C, H, W], normalised. recorded: as in `loss`.

        mask: bool [B, H/P, W/P], True = masked. Where it is None, one is drawn from `generator`, or without that on the
        images' device. num_visible: as in `SparseEncoder.forward`; it is known where the mask is drawn here.
        """
        if mask is None:
            device = None if generator else images.device
            mask = self.draw_mask(len(images), images.shape[2:], generator=generator, device=device)
            num_visible = self.num_visible(images.shape[2:])
        mask = mask.to(images.device)
        features = self.encoder(images, mask, num_visible)
        prediction = self.decode(features, mask)
        return FCMAEOutput(self.loss(images, prediction, mask, recorded), prediction, mask)

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, D, H/P, W/P] of images of which nothing is masked."""
        return self.encoder(images)

    def decode(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features [B, D, H/P, W/P] of the visible patches -> prediction [B, L, P * P * C] of all patches."""
        x = pointwise(features.permute(0, 2, 3, 1), self.proj).to(features.dtype)
        x = torch.where(mask[..., None], self.mask_token.flatten().to(x.dtype), x)
        backend = resolve_backend(self.encoder.backend, x.device.type, product_dtype(self), dense=True)
        patches = backend(torch.zeros_like(mask), mask.shape[1] * mask.shape[2])
        x = patches.gather(x.permute(0, 3, 1, 2))
        x = run_blocks(self.decoder, x, patches)
        return pointwise(patches.scatter(x).permute(0, 2, 3, 1).flatten(1, 2), self.pred)

    def loss(self, images: Tensor, prediction: Tensor, mask: Tensor, recorded: Tensor | None = None) -> Tensor:
        """Mean squared error over the pixels of the masked patches, in float32.

        recorded: bool [B, C, H, W], where the images have values, None for everywhere. The others count neither in the
        targets nor in the error, and the error of a patch without any is 0. The mean is over all masked patches, whose
        number is known, so that it is the same however a batch is divided.
        """
        target = patchify(images.float(), self.patch_size)
        if recorded is not None:
            return self._loss_of_recorded(target, prediction.float(), mask, patchify(recorded.float(), self.patch_size))
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + TARGET_EPS).sqrt()
        error = F.mse_loss(prediction.float(), target, reduction="none").mean(-1)
        masked = mask.flatten(1)
        return error.masked_fill(~masked, 0).sum() / masked.sum().clamp_min(1)

    def _loss_of_recorded(self, target: Tensor, prediction: Tensor, mask: Tensor, recorded: Tensor) -> Tensor:
        """The loss over the values of the patches [B, L, P * P * C] that are recorded: 1 where one is, 0 elsewhere."""
        count = recorded.sum(-1, keepdim=True)
        if self.norm_pix_loss:
            mean = (target * recorded).sum(-1, keepdim=True) / count.clamp_min(1)
            deviation = (target - mean) * recorded
            variance = deviation.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)
            target = deviation / (variance + TARGET_EPS).sqrt()
        squares = ((prediction - target) * recorded).square()
        error = squares.sum(-1) / count.squeeze(-1).clamp_min(1)
        masked = mask.flatten(1)
        return error.masked_fill(~masked, 0).sum() / masked.sum().clamp_min(1)

    def draw_mask(
        self,
        batch: int,
        image_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Random masks bool [batch, H/P, W/P] for images of (H, W) pixels, each with `num_visible(image_size)`."""
        grid = self.encoder.grid(*image_size)
        cells = self._mask_cells(grid)
        mask = random_mask(batch, cells, self.mask_ratio, generator=generator, device=device)
        return mask.repeat_interleave(grid[0] // cells[0], 1).repeat_interleave(grid[1] // cells[1], 2)

    def num_visible(self, image_size: tuple[int, int]) -> int:
        """How many patches of every image `draw_mask` leaves visible."""
        grid = self.encoder.grid(*image_size)
        cells = self._mask_cells(grid)
        return num_visible_patches(cells, self.mask_ratio) * (grid[0] // cells[0]) * (grid[1] // cells[1])

    def with_backend(self, backend: str) -> "FCMAE":
        """The same layers and parameters, not copies, run by another backend."""
        other = copy(self)
        other._modules = self._modules | {"encoder": self.encoder.with_backend(backend)}
        return other

    def _mask_cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the grid that masks are drawn on, over a grid of patches."""
        if self.mask_grid is not None and self.mask_patch_size is not None:
            raise UserError("`mask_grid` and `mask_patch_size` exclude each other: give one")
        if self.mask_grid is not None:
            if self.mask_grid < 1 or grid[0] % self.mask_grid or grid[1] % self.mask_grid:
                raise UserError(
                    f"`mask_grid` {self.mask_grid} does not divide the {grid[0]}x{grid[1]} patches of "
                    f"{self.patch_size} pixels: choose a divisor, a larger `image_size`, or a smaller `stem_stride`"
                )
            return self.mask_grid, self.mask_grid
        mask_patch_size = self.patch_size if self.mask_patch_size is None else self.mask_patch_size
        side, rest = divmod(mask_patch_size, self.patch_size)
        if rest or side < 1 or grid[0] % side or grid[1] % side:
            raise UserError(f"`mask_patch_size` {mask_patch_size} {self._tiling(mask_patch_size, grid)}")
        return grid[0] // side, grid[1] // side

    def _tiling(self, mask_patch_size: int, grid: tuple[int, int]) -> str:
        """What is wrong with squares of so many pixels that do not tile a grid of patches, and which do."""
        height, width = (self.patch_size * patches for patches in grid)
        tiling = [
            str(self.patch_size * side) for side in range(1, min(grid) + 1) if grid[0] % side == grid[1] % side == 0
        ]
        divides = mask_patch_size > 0 and height % mask_patch_size == width % mask_patch_size == 0
        return (
            f"does not tile the {height}x{width} image in whole patches of {self.patch_size} pixels: choose "
            f"{' or '.join(tiling)}{self.encoder.smaller_patch(mask_patch_size) if divides else ''}"
        )


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of channels-last features, as the matrix product that it is."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, P * P * C], pixels in (row, column, channel) order."""
    batch, channels, height, width = images.shape
    rows, cols = height // patch_size, width // patch_size
    x = images.reshape(batch, channels, rows, patch_size, cols, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * cols, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for a grid of (rows, cols) patches: [B, L, P * P * C] -> [B, C, H, W]."""
    rows, cols = grid
    x = patches.reshape(len(patches), rows, cols, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch_size, cols * patch_size)


def create_fcmae(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    mask_ratio: float = 0.6,
    backend: str = "auto",
    **options,
) -> FCMAE:
    """An `FCMAE` with new weights; options are its further arguments."""
    return FCMAE(name, image_size=image_size, in_chans=in_chans, mask_ratio=mask_ratio, backend=backend, **options)
