"""`native` and `torch`: features as the list of visible blocks [T, S, S, C]."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae import ops
from sparse_fcmae.kernels import cpu
from sparse_fcmae.masking import VisiblePatches
from sparse_fcmae.ops import reference


class BlockLayout:
    """Visible patches of the whole batch sorted by image; patch borders matter to the depthwise convolution alone."""

    convolve: ClassVar[Callable[..., Tensor]]  # ops.block_dwconv or its reference
    respond: ClassVar[Callable[..., Tensor]]  # ops.gelu_grn or its reference

    def __init__(self, mask: Tensor) -> None:
        self.visible = VisiblePatches.of(mask)

    def enter(self, x: Tensor) -> Tensor:
        batch, rows, cols = self.visible.mask.shape
        side = x.shape[2] // rows
        patches = x.reshape(batch, x.shape[1], rows, side, cols, side).permute(0, 2, 4, 3, 5, 1)
        row, col = self.visible.index // cols % rows, self.visible.index % cols
        return patches[self.visible.image, row, col]

    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        blocks, side, _, channels = x.shape
        k = conv.kernel_size[0]
        tiles = x.view(blocks, side // k, k, side // k, k, channels).transpose(2, 3)
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(tiles.reshape(blocks, side // k, side // k, k * k * channels), weight, conv.bias)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return self.convolve(x, conv.weight, conv.bias, self.visible.slot, self.visible.index)

    def gelu_grn(self, x: Tensor, gamma: Tensor, scope: str) -> Tensor:
        offsets = self.visible.offsets if scope == "image" else self.visible.offsets[[0, -1]]
        return self.respond(x, gamma.flatten(), offsets)

    def leave(self, x: Tensor) -> Tensor:
        batch, rows, cols = self.visible.mask.shape
        canvas = x.new_zeros(batch * rows * cols, x.shape[-1]).index_copy(0, self.visible.index, x.flatten(0, 2))
        return canvas.view(batch, rows, cols, x.shape[-1]).permute(0, 3, 1, 2)


class NativeLayout(BlockLayout):
    """This package's own kernels: C++ on the CPU."""

    name = "native"

    convolve = staticmethod(ops.block_dwconv)
    respond = staticmethod(ops.gelu_grn)

    @staticmethod
    def unusable(device: torch.device) -> str | None:
        return cpu.unusable() if device.type == "cpu" else f"there are no native kernels for {device.type}"


class TorchLayout(BlockLayout):
    """Plain PyTorch on any device: the depthwise convolution runs on a dense canvas, the rest on visible positions."""

    name = "torch"

    convolve = staticmethod(reference.block_dwconv)
    respond = staticmethod(reference.gelu_grn)

    @staticmethod
    def unusable(device: torch.device) -> str | None:
        return None
