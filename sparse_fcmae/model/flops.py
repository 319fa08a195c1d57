"""Multiply-accumulates (MACs) and parameters of the models, dense and sparse, of one image's forward pass.

What is counted is what `torch.utils.flop_counter` counts of the plain modules, halved: convolutions, matrix products.
Dense, a convolution's taps count beyond the border too. Sparse, only those between two visible positions do.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_fcmae.kernels.constants import HALO, SIDES, WINDOW
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.convnext import Block, size_of
from sparse_fcmae.model.masking import num_visible_patches
from sparse_fcmae.ops.flops import visible_taps
from sparse_fcmae.runtime.errors import UserError

CLASSES = 1000  # of ImageNet-1K, as the published figures have them
Product = tuple[int, int, int]  # positions along a patch, channels in, channels out

# MACs in G of https://github.com/facebookresearch/ConvNeXt-V2, at each of the image sizes that it lists
PUBLISHED = {
    "atto": {224: 0.55},
    "femto": {224: 0.78},
    "pico": {224: 1.37},
    "nano": {224: 2.45, 384: 7.21},
    "tiny": {224: 4.47, 384: 13.1},
    "base": {224: 15.4, 384: 45.2},
    "large": {224: 34.4, 384: 101.1},
    "huge": {224: 115.0, 384: 337.9, 512: 600.8},
}


@dataclass(frozen=True)
class Part:
    """Parameters of a part of a model, and MACs of an image: all positions computed, the visible ones only."""

    parameters: int
    dense: float
    sparse: float


def count(
    name: str,
    *,
    image_size: tuple[int, int] = (224, 224),
    mask_ratio: float = 0.6,
    mask: Tensor | None = None,
    in_chans: int = 3,
    num_classes: int = CLASSES,
    stem_stride: int = 4,
    decoder_dim: int = 512,
    decoder_depth: int = 1,
) -> dict[str, Part]:
    """What each part of a model costs: "stem", "stage 1" to "stage 4", "head", "decoder", and the first five together
    as "encoder", with the head as "classifier".

    mask: bool [B, rows, cols], True = masked: the sparse MACs are the mean over these images, exactly. Without it they
    are what to expect of uniformly random masks of `mask_ratio`. A stage has the downsampling before it. Of the decoder
    the sparse count is that of the loss: the visible patches are projected, the masked ones predicted. The classifier
    computes all patches: its sparse count is the dense one. Raises UserError for a size that the model can't take, a
    mask of another, or a ratio that keeps or masks nothing (0 is allowed).
    """
    options = {"image_size": image_size, "in_chans": in_chans, "stem_stride": stem_stride}
    with torch.device("meta"):
        model = Classifier(name, num_classes=num_classes, **options)
        block = Block(decoder_dim)
    rows, cols = grid = model.grid(*image_size)
    patches = rows * cols
    if mask is not None and tuple(mask.shape[1:]) != grid:
        raise UserError(f"the mask is of {mask.shape[1]}x{mask.shape[2]} patches, the images of {rows}x{cols}")
    visible = (~mask).sum().item() / len(mask) if mask is not None else visible_patches(grid, mask_ratio)

    parts = {}
    depths, dims = size_of(name)
    for i, (side, depth, dim) in enumerate(zip(SIDES, depths, dims, strict=True)):
        stem, *blocks = stage_products(name, i, in_chans, stem_stride)
        taps = visible_taps(mask, side) / len(mask) if mask is not None else expected_taps(grid, int(visible), side)
        convolved = (depth * dim * WINDOW**2 * side**2 * patches, depth * dim * taps)
        down, inside = model.downsample_layers[i], parameters(model.stages[i])
        if i == 0:
            parts["stem"] = Part(parameters(down), macs([stem], patches), macs([stem], visible))
        else:
            blocks, inside = [stem, *blocks], inside + parameters(down)
        dense, sparse = (macs(blocks, n) + c for n, c in zip((patches, visible), convolved, strict=True))
        parts[f"stage {i + 1}"] = Part(inside, dense, sparse)
    parts["encoder"] = together(parts.values())
    head = dims[-1] * num_classes
    parts["head"] = Part(parameters(model.norm) + parameters(model.head), head, head)
    whole = together((parts["encoder"], parts["head"]))
    parts["classifier"] = Part(whole.parameters, whole.dense, whole.dense)
    project, *blocks, predict = decoder_products(name, decoder_dim, decoder_depth, in_chans, stem_stride)
    inside = macs(blocks, patches) + decoder_depth * WINDOW**2 * decoder_dim * patches
    around = sum(outputs * (inputs + 1) for _, inputs, outputs in (project, predict)) + decoder_dim
    dense = inside + macs([project, predict], patches)
    sparse = inside + macs([project], visible) + macs([predict], patches - visible)
    parts["decoder"] = Part(around + decoder_depth * parameters(block), dense, sparse)
    return parts


def visible_patches(grid: tuple[int, int], ratio: float) -> int:
    """How many patches of a grid a random mask of a ratio leaves visible; for a ratio of 0 all."""
    return num_visible_patches(grid, ratio) if ratio else grid[0] * grid[1]


def stage_products(name: str, stage: int, in_chans: int = 3, stem_stride: int = 4) -> list[Product]:
    """The matrix products that one image's patch takes in a stage (0 to 3): stem or downsampling, then the blocks'."""
    depths, dims = size_of(name)
    side, dim = SIDES[stage], dims[stage]
    inputs = 4 * dims[stage - 1] if stage else in_chans * stem_stride**2
    return [(side, inputs, dim), *[(side, dim, 4 * dim), (side, 4 * dim, dim)] * depths[stage]]


def decoder_products(
    name: str, dim: int = 512, depth: int = 1, in_chans: int = 3, stem_stride: int = 4
) -> list[Product]:
    """The matrix products that one image's patch takes in the decoder: projection, blocks, prediction of its pixels."""
    pixels = (SIDES[0] * stem_stride) ** 2 * in_chans
    return [(1, size_of(name)[1][-1], dim), *[(1, dim, 4 * dim), (1, 4 * dim, dim)] * depth, (1, dim, pixels)]


def macs(products: Iterable[Product], patches: float) -> float:
    """MACs of matrix products over so many patches."""
    return sum(side**2 * inputs * outputs for side, inputs, outputs in products) * patches


def expected_taps(grid: tuple[int, int], visible: int, side: int) -> float:
    """The mean of an image's `visible_taps` over all masks that keep `visible` patches of a grid.

    Two positions of one patch are visible together in a fraction K / L of the masks, those of two patches in a fraction
    K (K - 1) / (L (L - 1)), where K of L patches are visible.
    """
    patches = grid[0] * grid[1]
    within = patches * pairs(side) ** 2
    between = pairs(grid[0] * side) * pairs(grid[1] * side) - within
    both = visible / patches * (visible - 1) / max(patches - 1, 1)
    return within * visible / patches + between * both


def pairs(length: int) -> int:
    """How many ordered pairs of positions on a line of some length are within a window's reach of each other."""
    return sum(max(0, length - abs(distance)) for distance in range(-HALO, HALO + 1))


def parameters(module: nn.Module) -> int:
    """How many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def together(parts: Iterable[Part]) -> Part:
    """Several parts as one."""
    counts = zip(*((p.parameters, p.dense, p.sparse) for p in parts), strict=True)
    return Part(*map(sum, counts))


def module_macs(module: nn.Module, *inputs: Tensor) -> float:
    """MACs of a forward pass of any module: half of what PyTorch counts."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return counter.get_total_flops() / 2
