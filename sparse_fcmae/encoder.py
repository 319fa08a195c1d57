"""Sparse ConvNeXt V2 encoder: one set of modules for masked and unmasked images, in the official dense layout.

Sizes and block: ConvNeXt V2 (Woo et al., 2023), sections 3.1 and 3.2 and appendix A.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from sparse_fcmae.backends import check_backend, resolve_backend
from sparse_fcmae.backends.layout import Layout, compute_dtype
from sparse_fcmae.errors import UserError

SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # name: depths, widths
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


class GRN(nn.Module):
    """Parameters of global response normalisation over `dim` channels; the layout computes it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))


class Block(nn.Module):
    """ConvNeXt V2 block: x + pwconv2(GRN(GELU(pwconv1(LN(dwconv7x7(x)))))), on features [..., dim] of a layout."""

    def __init__(self, dim: int, grn_scope: str = "image") -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.grn_scope, self.drop_path = grn_scope, 0.0

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.training and self.drop_path:
            return layout.drop_path(x, self, self.drop_path)
        return layout.block(x, self)


class SparseEncoder(nn.Module):
    """ConvNeXt V2 encoder over the visible patches only.

    name: one of SIZES. image_size: pixels, H and W or one for both, multiples of the patch; other sizes that are
    multiples too can be given to `forward`. stem_stride: 4, 2 or 1; the patch is 8 times that. grn_scope: "image", or
    "batch" for the pooling over the whole batch of the original code. backend: see `backends.available_backends`.
    Raises UserError for a wrong name, size or option.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        backend: str = "auto",
        stem_stride: int = 4,
        grn_scope: str = "image",
    ) -> None:
        super().__init__()
        if name not in SIZES:
            raise UserError(f"unknown model {name!r}: choose one of {', '.join(SIZES)}")
        if stem_stride not in (4, 2, 1):
            raise UserError(f"stem stride {stem_stride} is not supported: choose --stem-stride 4, 2 or 1")
        if grn_scope not in ("image", "batch"):
            raise UserError(f"unknown GRN scope {grn_scope!r}: choose --grn-scope image or batch")
        if in_chans < 1:
            raise UserError(f"{in_chans} input channels: --in-chans must be at least 1")
        check_backend(backend)
        self.name, self.in_chans, self.backend = name, in_chans, backend
        self.stem_stride, self.grn_scope = stem_stride, grn_scope
        self.patch_size = 8 * stem_stride
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.grid(*self.image_size)

        depths, dims = SIZES[name]
        self.num_features = dims[-1]
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], stem_stride, stem_stride), nn.LayerNorm(dims[0], eps=1e-6))
        downs = [nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.Conv2d(dim, out, 2, 2)) for dim, out in pairwise(dims)]
        self.downsample_layers = nn.ModuleList([stem, *downs])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, grn_scope) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.apply(init_weights)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; UserError where its sides are not multiples of the patch."""
        for side in (height, width):
            if side < self.patch_size or side % self.patch_size:
                raise UserError(
                    f"image size {height}x{width} is not a multiple of the {self.patch_size}-pixel patch: "
                    f"choose an --image-size that is, such as {max(1, round(side / self.patch_size)) * self.patch_size}"
                )
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor, mask: Tensor | None = None, kept: int | None = None) -> Tensor:
        """images [B, C, H, W] floating; mask bool [B, H/P, W/P], True = masked, or None for no mask.

        kept: how many patches every image keeps, where the mask keeps equally many, as `random_mask`'s do. The host
        then never waits for a GPU, and the whole can be compiled and captured in a CUDA graph. A wrong number is a
        RuntimeError, on a GPU a failed assertion on the device, after which the process can't use it any more.

        Returns the last stage's features [B, D, H/P, W/P], zeros where masked. Honours autocast; the residual stream
        stays float32. Raises UserError for images or a mask of another shape.
        """
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise UserError(f"images must be [B, {self.in_chans}, H, W], not {list(images.shape)}")
        grid = self.grid(*images.shape[2:])
        if mask is None:
            mask = torch.zeros(images.shape[0], *grid, dtype=torch.bool, device=images.device)
            kept = grid[0] * grid[1]
        if mask.shape != (images.shape[0], *grid) or mask.dtype != torch.bool:
            raise UserError(
                f"the mask must be bool [{images.shape[0]}, {grid[0]}, {grid[1]}], not {mask.dtype} {list(mask.shape)}"
            )

        layout = resolve_backend(self.backend, images.device.type, compute_dtype(self))(mask.to(images.device), kept)
        x = images
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = layout.downsample(x, *down) if i else layout.stem(x, *down)
            for block in stage:
                x = block(x, layout)
        return layout.leave(x)


def init_weights(module: nn.Module) -> None:
    """Truncated normal of standard deviation 0.02 for weights, zero for biases, as in the official code."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def create_encoder(
    name: str,
    *,
    image_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    backend: str = "auto",
    **options,
) -> SparseEncoder:
    """A `SparseEncoder` with new weights; options are its further arguments."""
    return SparseEncoder(name, image_size=image_size, in_chans=in_chans, backend=backend, **options)
