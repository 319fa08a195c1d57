"""ConvNeXt V2 over the visible patches of images: one set of modules for masked and unmasked images.

Sizes and block: ConvNeXt V2 (Woo et al., 2023), sections 3.1 and 3.2 and appendix A. The state dict has the official
names and the dense shapes.
"""

import math
import re
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_fcmae.backends import check_backend, resolve_backend
from sparse_fcmae.backends.patches import Patches, product_dtype
from sparse_fcmae.kernels.constants import EPS, SIDES
from sparse_fcmae.runtime.errors import UserError

Size = tuple[tuple[int, ...], tuple[int, ...]]  # blocks and channels of each of the four stages
SIZES: dict[str, Size] = {  # the published ones
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
GIANTS: dict[str, Size] = {  # huge made wider, to 1.1 and 3.1 billion parameters
    "giant": ((3, 3, 27, 3), (448, 896, 1792, 3584)),
    "gigantic": ((3, 3, 27, 3), (768, 1536, 3072, 6144)),
}
STEM_STRIDES = (4, 2, 1)
LAYER_SCALE = 1e-6  # at first, as in ConvNeXt V1
OTHER = re.compile(r"(\d+(?:-\d+){3}):(\d+(?:-\d+){3})")  # how the name of any other size is made of its numbers


def size_of(name: str) -> Size:
    """The blocks and channels of a size, by its name or as "2-2-6-2:40-80-160-320". Raises UserError for others."""
    known = SIZES | GIANTS
    if name in known:
        return known[name]
    if not (match := OTHER.fullmatch(name)):
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(known)}")
    depths, dims = (tuple(map(int, numbers.split("-"))) for numbers in match.groups())
    if not all((*depths, *dims)):
        raise UserError(f"model {name!r}: each stage needs a block and a channel at least")
    return depths, dims


def name_of(depths: tuple[int, ...], dims: tuple[int, ...]) -> str:
    """The name that `size_of` takes for these blocks and channels."""
    known = {size: name for name, size in (SIZES | GIANTS).items()}
    return known.get((depths, dims)) or ":".join("-".join(map(str, numbers)) for numbers in (depths, dims))


class GRN(nn.Module):
    """GELU, then global response normalisation over `dim` channels: one layer, as the kernels compute both at once."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor, patches: Patches, scope: str) -> Tensor:
        """Features [..., dim] of the patches -> features of the same shape and dtype. scope: as in `Block`."""
        return patches.gelu_grn(x, self.gamma, self.beta, scope)


class Block(nn.Module):
    """ConvNeXt V2 block: x + pwconv2(GRN(GELU(pwconv1(LN(dwconv7x7(x)))))) (ConvNeXt V2, sections 3.1 and 3.2).

    GELU is the exact one, by erf. With h = GELU(pwconv1(...)) and G_c the norm of channel h_c over the visible
    positions of an image, or of the batch if grn_scope is "batch", GRN(h) is
    h * (1 + gamma * G / (mean of G over the channels + eps)) + beta. eps is 1e-6, in LN and in GRN. Only dwconv7x7
    looks at other positions, and only at visible ones (submanifold convolution).

    For comparison, `grn=False` leaves GRN out, and `layer_scale=True` multiplies what is added by a learnt factor per
    channel, 1e-6 at first. Both together are ConvNeXt V1's block (Liu et al., 2022), which runs layer by layer.

    `drop_path` and `checkpointed` are applied by `Stage`. A block that is called by itself heeds neither.
    """

    def __init__(self, dim: int, grn_scope: str = "image", grn: bool = True, layer_scale: bool = False) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim) if grn else None
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE)) if layer_scale else None
        self.grn_scope = grn_scope
        self.drop_path = 0.0  # the probability with which an image skips this block in training
        self.checkpointed = False  # whether its inside is computed again in the backward pass, and not kept

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        """Features [..., dim] of the patches -> features of the same shape and dtype."""
        layers = (self.dwconv, self.norm, self.pwconv1, self.grn, self.pwconv2)
        if type(self.grn) is GRN and self.gamma is None and patches.fuses(*layers):
            return patches.fused_block(x, self.ten_parameters(), self.grn_scope)
        y = self.pwconv2(self.expanded(x, patches))
        return x + (y if self.gamma is None else self.gamma * y)

    def expanded(self, x: Tensor, patches: Patches) -> Tensor:
        """GRN's features [..., 4 * dim], or GELU's where there is no GRN, which pwconv2 takes."""
        y = patches.dwconv(x, self.dwconv)
        y = self.norm(y)
        y = self.pwconv1(y)
        return F.gelu(y) if self.grn is None else self.grn(y, patches, self.grn_scope)

    def ten_parameters(self) -> list[Tensor]:
        """All parameters in the official order, as `ops.convnext_block` takes them."""
        return [
            self.dwconv.weight,
            self.dwconv.bias,
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            self.grn.gamma,
            self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
        ]


class Stem(nn.Sequential):
    """Convolution and LayerNorm of images, whose windows tile them."""

    def forward(self, images: Tensor, patches: Patches, statistics: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] -> features of the first stage. statistics: as in `SparseEncoder.forward`."""
        return patches.stem(images, *self, statistics)


class Downsampling(nn.Sequential):
    """LayerNorm and convolution between two stages."""

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        """Features of one stage -> features of the next."""
        return patches.downsample(x, *self)


class Stage(nn.Sequential):
    """Blocks, one after the other."""

    def forward(self, x: Tensor, patches: Patches) -> Tensor:
        """Features of the patches -> features of the same shape. In training some images skip some blocks."""
        for block in self:
            run, drop_path = block, getattr(block, "drop_path", 0.0)  # a block may be any module, such as one around it
            if getattr(block, "checkpointed", False):
                run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            skipping = block.training and drop_path and len(patches.mask)
            x = stochastic_depth(run, drop_path, x, patches) if skipping else run(x, patches)
        return x


class SparseEncoder(nn.Module):
    """ConvNeXt V2's encoder, computed at the visible patches only.

    name: as in `size_of`. image_size: pixels, (height, width) or one number for both, multiples of the patch; `forward`
    takes other multiples too. in_chans: channels of the images. stem_stride: 4, 2 or 1; the patch is 8 times that.
    grn_scope: "image", or "batch" for the pooling over the whole batch of the public code. grn, layer_scale: as in
    `Block`. backend: see `available_backends`. Raises UserError for a wrong name, size or option.
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
        grn: bool = True,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        depths, dims = size_of(name)
        if stem_stride not in STEM_STRIDES:
            raise UserError(f"`stem_stride` {stem_stride} is not supported: choose 4, 2 or 1")
        if grn_scope not in ("image", "batch"):
            raise UserError(f"`grn_scope` {grn_scope!r} is unknown: choose image or batch")
        if in_chans < 1:
            raise UserError(f"`in_chans` {in_chans} must be at least 1")
        check_backend(backend)
        self.name, self.in_chans, self.backend = name, in_chans, backend
        self.stem_stride, self.grn_scope = stem_stride, grn_scope
        self.grn, self.layer_scale = grn, layer_scale
        self.patch_size = SIDES[0] * stem_stride
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.grid(*self.image_size)

        self.channels, self.num_features = dims, dims[-1]  # of the maps of the four stages, and of the last one
        self.strides = tuple(stem_stride * 2**stage for stage in range(4))  # pixels from position to position in them
        self.transform: Callable[[Any], Tensor] | None = None  # what makes its input of an image, where that is known
        stem = Stem(nn.Conv2d(in_chans, dims[0], stem_stride, stem_stride), nn.LayerNorm(dims[0], eps=EPS))
        downs = [Downsampling(nn.LayerNorm(dim, eps=EPS), nn.Conv2d(dim, out, 2, 2)) for dim, out in pairwise(dims)]
        self.downsample_layers = nn.ModuleList([stem, *downs])
        self.stages = nn.ModuleList(
            Stage(*(Block(dim, grn_scope, grn, layer_scale) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.apply(init_weights)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | Patches | None = None,
        num_visible: int | None = None,
        statistics: Tensor | None = None,
    ) -> Tensor:
        """The last stage's features, [B, D, H/P, W/P], zeros where masked.

        images: [B, C, H, W], floating and normalised, or with `statistics` as they are stored. statistics: float64
        [2, C], mean and deviation of each channel of images of any dtype that images are stored in, which are
        normalised where they are read; pixels that are not finite are missing and count as their channel's mean.

        mask: bool [B, H/P, W/P], True = masked, or None for no mask. num_visible: how many patches of every image are
        visible, where all masks have equally many, as those of `random_mask` have. The host then never waits for a GPU,
        and the whole can be compiled and captured in a CUDA graph. A wrong number is a RuntimeError; on a GPU it is a
        failed assertion of the device, which the process can't use any more.

        In place of the mask, what `patches` made of it may be given. The features are then those of the visible
        patches, as `patches` holds them.

        Honours autocast; the residual stream stays float32. Raises UserError for images or a mask of another shape.
        """
        patches = mask if isinstance(mask, Patches) else self.patches(images, mask, num_visible)
        *_, x = self.stage_outputs(images, patches, statistics)
        return x if patches is mask else patches.scatter(x)

    def features(
        self, images: Tensor, mask: Tensor | None = None, num_visible: int | None = None
    ) -> tuple[Tensor, ...]:
        """The maps of the four stages, [B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])].

        images: [B, C, H, W], floating and normalised, of any size. Sides that are no multiples of the patch are padded
        with zeros at the bottom and on the right, and the maps cut to what lies on the image. mask, num_visible: as in
        `forward`, over the patches of the padded image; maps are zero where it is masked. A classifier's maps are those
        before its final norm. Raises UserError as `forward` does.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size))
        patches = self.patches(images, mask, num_visible)
        maps = [patches.scatter(x) for x in self.stage_outputs(images, patches)]
        return tuple(
            x[:, :, : math.ceil(height / stride), : math.ceil(width / stride)]
            for x, stride in zip(maps, self.strides, strict=True)
        )

    def stage_outputs(self, images: Tensor, patches: Patches, statistics: Tensor | None = None) -> list[Tensor]:
        """The features of the visible patches behind each stage, as `patches` holds them."""
        if statistics is None and not images.is_floating_point():
            raise UserError(
                f"images are {str(images.dtype).removeprefix('torch.')}: normalise them or give `statistics`"
            )
        x = self.downsample_layers[0](images, patches, statistics)
        outputs = [self.stages[0](x, patches)]
        for downsample, stage in zip(self.downsample_layers[1:], self.stages[1:], strict=True):
            x = downsample(outputs[-1], patches)
            outputs.append(stage(x, patches))
        return outputs

    def preprocess(self, images: Any) -> Tensor:
        """Images as they are -> [B, C, H, W] on the encoder's device, normalised as its weights were trained with.

        images: a path, a binary file, an image of Pillow's, an array, a tensor, or a list of these, of any sizes. Each
        is cropped around its centre and resized, as `load_transform` says. Raises OSError for an image that can't be
        read, and UserError where the weights were not loaded from a checkpoint.
        """
        if self.transform is None:
            raise UserError("how images are prepared is known of loaded weights alone: see `load_encoder`")
        several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        return torch.stack([self.transform(image) for image in several]).to(next(self.parameters()).device)

    def with_backend(self, backend: str) -> "SparseEncoder":
        """The same layers and parameters, not copies, run by another backend."""
        check_backend(backend)
        other = copy(self)
        other.backend = backend
        return other

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; UserError where its sides are not multiples of the patch."""
        for side in (height, width):
            if side < self.patch_size or side % self.patch_size:
                raise UserError(
                    f"`image_size` {height}x{width} is not a multiple of the {self.patch_size}-pixel patch: choose one "
                    f"that is, such as {max(1, round(side / self.patch_size)) * self.patch_size}"
                    + self.smaller_patch(height, width)
                )
        return height // self.patch_size, width // self.patch_size

    def smaller_patch(self, *sides: int) -> str:
        """Words to add to a refusal: the stem stride, if there is one, whose patch divides sides of so many pixels."""
        for stride in (2, 1):
            patch = SIDES[0] * stride
            if stride < self.stem_stride and all(side >= patch and side % patch == 0 for side in sides):
                return f", or give a new model `stem_stride={stride}`, whose patch has {patch} pixels"
        return ""

    def patches(self, images: Tensor, mask: Tensor | None = None, num_visible: int | None = None) -> Patches:
        """What the backend makes of the mask of a batch of images. The arguments and errors are those of `forward`."""
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise UserError(f"images must be [B, {self.in_chans}, H, W], not {list(images.shape)}")
        batch, (rows, cols) = images.shape[0], self.grid(*images.shape[2:])
        if mask is None:
            mask = torch.zeros(batch, rows, cols, dtype=torch.bool, device=images.device)
            num_visible = rows * cols
        if mask.shape != (batch, rows, cols) or mask.dtype != torch.bool:
            raise UserError(f"the mask must be bool [{batch}, {rows}, {cols}], not {mask.dtype} {list(mask.shape)}")
        backend = resolve_backend(self.backend, images.device.type, product_dtype(self))
        return backend(mask.to(images.device), num_visible)


def stochastic_depth(block: Callable[[Tensor, Patches], Tensor], rate: float, x: Tensor, patches: Patches) -> Tensor:
    """The block for each image with probability 1 - rate; the other images skip it and cost nothing.

    What the block adds is scaled so that its mean stays (Huang et al., 2016). For images of which nothing is masked.
    """
    batch = len(patches.mask)
    # drawn on the host, which has to know how many there are
    images, scale = (torch.rand(batch) >= rate).nonzero()[:, 0], 1 / (1 - rate)
    if not len(images):  # a gradient of zeros, not none, as processes that train together need
        images, scale = torch.zeros(1, dtype=torch.long), 0.0
    images = images.to(x.device, non_blocking=True)
    of_image = x.unflatten(0, (batch, -1))
    before = of_image[images].flatten(0, 1)
    after = torch.lerp(before, block(before, patches.of_images(len(images))), scale)
    return of_image.index_copy(0, images, after.unflatten(0, (len(images), -1))).flatten(0, 1)


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
    stem_stride: int = 4,
    grn_scope: str = "image",
    grn: bool = True,
    layer_scale: bool = False,
) -> SparseEncoder:
    """A `SparseEncoder` with new weights."""
    return SparseEncoder(
        name,
        image_size=image_size,
        in_chans=in_chans,
        backend=backend,
        stem_stride=stem_stride,
        grn_scope=grn_scope,
        grn=grn,
        layer_scale=layer_scale,
    )
