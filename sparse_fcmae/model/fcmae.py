"""Fully convolutional masked autoencoder: sparse encoder, dense decoder, loss on the masked patches.

ConvNeXt V2 (Woo et al., 2023), section 3.1. The state dict has the official names.
"""

from collections.abc import Iterator
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends import resolve_backend
from sparse_fcmae.backends.layers import is_tiling, say_called
from sparse_fcmae.backends.patch_map import flat_positions
from sparse_fcmae.backends.patches import Patches, product_dtype, zero_masked
from sparse_fcmae.model.convnext import Block, SparseEncoder, Stage, init_weights
from sparse_fcmae.model.masking import num_visible_patches, random_mask
from sparse_fcmae.ops.reference import normalise
from sparse_fcmae.runtime.errors import UserError


class FCMAEOutput:
    """What an FCMAE gives. `loss, prediction, mask = output` takes it apart.

    loss: float32 scalar. mask: bool [B, H/P, W/P], True = masked. prediction: [B, L, P * P * C], a patch's pixels in
    (row, column, channel) order. The loss needs that of the masked patches alone. So where gradients are recorded, that
    of all patches is computed when it is first read, and can't be read any more once the weights have changed.
    """

    def __init__(self, loss: Tensor, mask: Tensor, prediction: Tensor | None, decoded: Tensor, pred: nn.Conv2d) -> None:
        """prediction: [B * L, P * P * C], or None where it is to be computed from `decoded` [B * L, D] by `pred`."""
        self.loss, self.mask, self._prediction, self._decoded, self._pred = loss, mask, prediction, decoded, pred
        if prediction is None:
            self._dtype, self._version = product_dtype(pred), pred.weight._version

    @property
    def prediction(self) -> Tensor:
        if self._prediction is None:
            if self._pred.weight._version != self._version:
                raise RuntimeError("the weights have changed: read `prediction` before the optimiser's step")
            weight, bias = self._pred.weight.flatten(1).to(self._dtype), self._pred.bias.to(self._dtype)
            self._prediction = F.linear(self._decoded.to(self._dtype), weight, bias)
        return self._prediction.unflatten(0, (len(self.mask), self.mask.shape[1] * self.mask.shape[2]))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.loss, self.prediction, self.mask))


class FCMAE(nn.Module):
    """Masks images, encodes their visible patches, predicts the pixels of the masked ones.

    mask_ratio: fraction of the patches that is masked. mask_patch_size: pixels, a multiple of the patch P; masks are
    drawn in squares of this side. mask_grid: masks are drawn on a grid of this many rows and columns instead.
    norm_pix_loss: each target patch is normalised by its own mean and variance. decoder_dim, decoder_depth: the
    decoder's width and blocks. grn, layer_scale: of the encoder's blocks. sparse: False, for comparison, has the
    encoder compute all patches densely, where masked pixels are zeros of normalised images. The other arguments are
    `SparseEncoder`'s. Raises UserError for values that do not fit together.
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
        grn: bool = True,
        layer_scale: bool = False,
        sparse: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = SparseEncoder(
            name,
            image_size=image_size,
            in_chans=in_chans,
            backend=backend,
            stem_stride=stem_stride,
            grn_scope=grn_scope,
            grn=grn,
            layer_scale=layer_scale,
        )
        self.sparse = sparse
        self.patch_size = self.encoder.patch_size
        self.mask_ratio, self.mask_patch_size, self.mask_grid = mask_ratio, mask_patch_size, mask_grid
        self.norm_pix_loss = norm_pix_loss
        if decoder_dim < 1 or decoder_depth < 1:
            raise UserError("`decoder_dim` and `decoder_depth` must be at least 1")

        self.proj = nn.Conv2d(self.encoder.num_features, decoder_dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.decoder = Stage(*(Block(decoder_dim) for _ in range(decoder_depth)))
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
        statistics: Tensor | None = None,
    ) -> FCMAEOutput:
        """images, statistics: as in `SparseEncoder.forward`; with `statistics`, missing pixels are no targets.

        mask: bool [B, H/P, W/P], True = masked. Where it is None, one is drawn from `generator`, or without that on the
        images' device. num_visible: as in `SparseEncoder.forward`; it is known where the mask is drawn here.
        """
        if mask is None:
            device = None if generator else images.device
            mask = self.draw_mask(len(images), images.shape[2:], generator=generator, device=device)
            num_visible = self.num_visible(images.shape[2:])
        mask = mask.to(images.device)
        patches, decoded, masked = self._decoded(images, mask, num_visible, statistics)
        later = torch.is_grad_enabled() and is_tiling(self.pred, 1)
        prediction = None if later else self._predict(decoded, patches)
        of_masked = self._predict(decoded, patches, masked) if later else prediction[masked]
        errors = patches.patch_errors(of_masked, images, masked, statistics, self.norm_pix_loss)
        return FCMAEOutput(errors.sum() / max(1, len(errors)), mask, prediction, decoded, self.pred)

    def errors(
        self, images: Tensor, mask: Tensor, num_visible: int | None = None, statistics: Tensor | None = None
    ) -> Tensor:
        """The error of each masked patch, float32 [M], image after image: their mean is the loss.

        It is the mean squared error over a patch's pixels (section 3.1), see `ops.patch_errors`. The arguments are
        those of `forward`.
        """
        patches, decoded, masked = self._decoded(images, mask.to(images.device), num_visible, statistics)
        prediction = self._predict(decoded, patches, masked)
        return patches.patch_errors(prediction, images, masked, statistics, self.norm_pix_loss)

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, D, H/P, W/P] of images of which nothing is masked."""
        return self.encoder(images)

    def decode(self, x: Tensor, patches: Patches) -> Tensor:
        """Features at the visible patches, as `patches` holds them -> features [B * L, decoder_dim] of all patches."""
        x = patches.linear(x, self.proj).to(x.dtype)
        x = patches.scatter(x, fill=self.mask_token.flatten().to(x.dtype))
        backend = resolve_backend(self.encoder.backend, x.device.type, product_dtype(self), dense=True)
        everywhere = backend(torch.zeros_like(patches.mask), patches.mask.shape[1] * patches.mask.shape[2])
        x = self.decoder(everywhere.gather(x), everywhere)
        return everywhere.scatter(x).permute(0, 2, 3, 1).flatten(0, 2)

    def _predict(self, decoded: Tensor, patches: Patches, rows: Tensor | None = None) -> Tensor:
        """The prediction [N, P * P * C] of the patches `rows` of all [B * L], or of all."""
        if is_tiling(self.pred, 1):
            return patches.pointwise(decoded if rows is None else decoded[rows], self.pred)
        say_called(self.pred)
        dense = decoded.view(*patches.mask.shape, decoded.shape[1]).permute(0, 3, 1, 2)
        prediction = patches.sized(self.pred(dense), self.pred, 1).permute(0, 2, 3, 1).flatten(0, 2)
        return prediction if rows is None else prediction[rows]

    def _decoded(
        self, images: Tensor, mask: Tensor, num_visible: int | None, statistics: Tensor | None
    ) -> tuple[Patches, Tensor, Tensor]:
        """The visible patches, what `decode` gives, and the flat positions of the masked patches, int64 [M]."""
        patches = self.encoder.patches(images, mask, num_visible)
        if self.sparse:
            x = self.encoder(images, patches, statistics=statistics)
        else:
            x = patches.gather(self.encoder(zero_masked(normalise(images, statistics), mask)))
        decoded = self.decode(x, patches)
        of_image = None if num_visible is None else mask.shape[1] * mask.shape[2] - num_visible
        return patches, decoded, flat_positions(mask, of_image)

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
