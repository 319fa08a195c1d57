"""Fully convolutional masked autoencoder: sparse encoder, dense decoder, loss on the masked patches.

ConvNeXt V2 (Woo et al., 2023), section 3.1. State-dict keys are the official ones.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends import resolve_backend
from sparse_fcmae.backends.layout import compute_dtype
from sparse_fcmae.encoder import Block, SparseEncoder, init_weights
from sparse_fcmae.errors import UserError
from sparse_fcmae.masking import kept_patches, random_mask

TARGET_EPS = 1e-6


class FCMAEOutput(NamedTuple):
    """loss: float32 scalar. prediction: [B, L, P * P * C], pixels in (row, column, channel) order. mask: bool
    [B, H/P, W/P], True = masked."""

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class FCMAE(nn.Module):
    """Masks images, encodes their visible patches, predicts the pixels of the masked ones.

    mask_ratio: share of the patches that is masked. mask_patch_size: pixels, a multiple of the patch P: masks are drawn
    in squares of this side. mask_grid: or rather draw them on a grid of this many rows and columns. norm_pix_loss:
    normalise each target patch by its own mean and variance. decoder_dim, decoder_depth: the decoder's width and
    blocks. The other arguments are `SparseEncoder`'s. Raises UserError for values that do not fit together.
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
        **encoder_options,
    ) -> None:
        super().__init__()
        self.encoder = SparseEncoder(name, image_size=image_size, in_chans=in_chans, backend=backend, **encoder_options)
        self.patch_size = self.encoder.patch_size
        self.mask_ratio, self.mask_patch_size, self.mask_grid = mask_ratio, mask_patch_size, mask_grid
        self.norm_pix_loss = norm_pix_loss
        if decoder_dim < 1 or decoder_depth < 1:
            raise UserError("--decoder-dim and --decoder-depth must be at least 1")

        self.proj = nn.Conv2d(self.encoder.num_features, decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = nn.Sequential(*(Block(decoder_dim) for _ in range(decoder_depth)))
        self.pred = nn.Conv2d(decoder_dim, self.patch_size**2 * in_chans, 1)
        for module in (self.proj, self.decoder, self.pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        kept_patches(self._mask_cells(self.encoder.grid(*self.encoder.image_size)), mask_ratio)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        kept: int | None = None,
    ) -> FCMAEOutput:
        """images [B, C, H, W], normalised. mask: bool [B, H/P, W/P], or None to draw one from `generator`, or without
        that on the images' device. kept: as in `SparseEncoder`; known where the mask is drawn here."""
        if mask is None:
            device = None if generator else images.device
            mask = self.draw_mask(len(images), images.shape[2:], generator=generator, device=device)
            kept = self.kept(images.shape[2:])
        mask = mask.to(images.device)
        prediction = self.decode(self.encoder(images, mask, kept), mask)
        return FCMAEOutput(self.loss(images, prediction, mask), prediction, mask)

    def draw_mask(
        self,
        batch: int,
        image_size: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Random masks bool [batch, H/P, W/P] for images of (H, W) pixels, each keeping `kept(image_size)` patches."""
        grid = self.encoder.grid(*image_size)
        cells = self._mask_cells(grid)
        mask = random_mask(batch, cells, self.mask_ratio, generator=generator, device=device)
        return mask.repeat_interleave(grid[0] // cells[0], 1).repeat_interleave(grid[1] // cells[1], 2)

    def kept(self, image_size: tuple[int, int]) -> int:
        """How many patches `draw_mask` keeps of every image."""
        grid = self.encoder.grid(*image_size)
        cells = self._mask_cells(grid)
        return kept_patches(cells, self.mask_ratio) * (grid[0] // cells[0]) * (grid[1] // cells[1])

    def decode(self, features: Tensor, mask: Tensor) -> Tensor:
        """features [B, D, H/P, W/P] of the visible patches -> prediction [B, L, P * P * C] for all patches."""
        x = self._pointwise(features.permute(0, 2, 3, 1), self.proj).to(features.dtype)
        x = torch.where(mask[..., None], self.mask_token.flatten().to(x.dtype), x)
        # beside MinkowskiEngine the decoder is dense, as in the original code
        backend = "masked" if self.encoder.backend == "minkowski" else self.encoder.backend
        layout = resolve_backend(backend, x.device.type, compute_dtype(self))(
            torch.zeros_like(mask), mask.shape[1] * mask.shape[2]
        )
        x = layout.enter(x.permute(0, 3, 1, 2))
        for block in self.decoder:
            x = block(x, layout)
        return self._pointwise(layout.leave(x).permute(0, 2, 3, 1), self.pred).flatten(1, 2)

    @staticmethod
    def _pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A 1x1 convolution of channels-last features, as the matrix product that it is."""
        return F.linear(x, conv.weight.flatten(1), conv.bias)

    def loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the masked patches' pixels, in float32."""
        target = patchify(images.float(), self.patch_size)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + TARGET_EPS).sqrt()
        error = F.mse_loss(prediction.float(), target, reduction="none").mean(-1)
        hidden = mask.flatten(1)
        return error.masked_fill(~hidden, 0).sum() / hidden.sum().clamp_min(1)

    def _mask_cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the grid that masks are drawn on, over a grid of patches."""
        if self.mask_grid is not None and self.mask_patch_size is not None:
            raise UserError("--mask-grid and --mask-patch-size exclude each other: give one")
        if self.mask_grid is not None:
            cells = (self.mask_grid, self.mask_grid)
            if self.mask_grid < 1 or grid[0] % self.mask_grid or grid[1] % self.mask_grid:
                raise UserError(
                    f"--mask-grid {self.mask_grid} does not divide the {grid[0]}x{grid[1]} patches of "
                    f"{self.patch_size} pixels: choose a divisor, or a larger image or smaller --stem-stride"
                )
            return cells
        side, rest = divmod(self.mask_patch_size or self.patch_size, self.patch_size)
        if rest or side < 1 or grid[0] % side or grid[1] % side:
            raise UserError(
                f"--mask-patch-size {self.mask_patch_size} must be a multiple of the {self.patch_size}-pixel patch "
                "that divides the image"
            )
        return grid[0] // side, grid[1] // side


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
