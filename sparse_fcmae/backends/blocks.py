"""`torch` and `native`: features as the list of visible blocks [T, S, S, C]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae import kernels, ops
from sparse_fcmae.backends.layout import Layout, compute_dtype
from sparse_fcmae.masking import VisiblePatches
from sparse_fcmae.ops import reference


class TorchLayout(Layout):
    """Visible patches of the whole batch sorted by image; patch borders matter to the depthwise convolution alone.

    Plain PyTorch on any device: that convolution runs on a dense canvas, the rest on visible positions.
    """

    name = "torch"

    def __init__(self, mask: Tensor, kept: int | None = None) -> None:
        super().__init__(mask, kept)
        self.visible = VisiblePatches.of(mask, kept)

    def enter(self, x: Tensor) -> Tensor:
        batch, rows, cols = self.visible.mask.shape
        side = x.shape[2] // rows
        patches = x.reshape(batch, x.shape[1], rows, side, cols, side).permute(0, 2, 4, 3, 5, 1)
        return patches[self.visible.image, self.visible.index // cols % rows, self.visible.index % cols]

    def leave(self, x: Tensor) -> Tensor:
        batch, rows, cols = self.visible.mask.shape
        canvas = x.new_zeros(batch * rows * cols, x.shape[-1]).index_copy(0, self.visible.index, x.flatten(0, 2))
        return canvas.view(batch, rows, cols, x.shape[-1]).permute(0, 3, 1, 2)

    def stem(self, images: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
        return norm(self._embed(images, conv)).to(norm.weight.dtype)

    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        blocks, side, _, channels = x.shape
        k = conv.kernel_size[0]
        tiles = x.view(blocks, side // k, k, side // k, k, channels).transpose(2, 3)
        return self._windows(tiles.reshape(blocks, side // k, side // k, k * k * channels), conv)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return reference.block_dwconv(x, conv.weight, conv.bias, self.visible.slot, self.visible.index)

    def gelu_grn(self, x: Tensor, gamma: Tensor, scope: str) -> Tensor:
        return reference.gelu_grn(x, gamma.flatten(), self.visible.offsets_of(scope))

    def _embed(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        """The stem's convolution, of the visible patches as they are gathered from the images, line by line."""
        _, rows, cols = self.visible.mask.shape
        channels, height = images.shape[1:3]
        side, k, device = height // rows, conv.kernel_size[0], images.device
        row, col = self.visible.index // cols % rows, self.visible.index % cols
        first = (self.visible.image * channels * height + row * side) * cols + col
        below = (torch.arange(channels, device=device)[:, None] * height + torch.arange(side, device=device)) * cols
        lines = images.reshape(-1, side).index_select(0, (first[:, None] + below.flatten()).flatten())
        windows = lines.view(-1, channels, side // k, k, side // k, k).permute(0, 2, 4, 1, 3, 5)
        windows = windows.to(compute_dtype(conv), memory_format=torch.contiguous_format).flatten(3)
        return F.linear(windows, conv.weight.flatten(1), conv.bias)

    @staticmethod
    def _windows(tiles: Tensor, conv: nn.Conv2d) -> Tensor:
        """The convolution, given its windows' inputs in the last dimension: row, column, channel."""
        return F.linear(tiles, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


class NativeLayout(TorchLayout):
    """This package's own kernels: C++ on the CPU, Triton on a GPU."""

    name = "native"

    @staticmethod
    def unusable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
        return kernels.unusable(device) or kernels.unfit(device, dtype)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return ops.block_dwconv(x, conv.weight, conv.bias, self.visible.slot, self.visible.index)

    def gelu_grn(self, x: Tensor, gamma: Tensor, scope: str) -> Tensor:
        return ops.gelu_grn(x, gamma.flatten(), self.visible.offsets_of(scope))

    def stem(self, images: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
        if not _plain(norm):
            return super().stem(images, conv, norm)
        return ops.layer_norm(self._embed(images, conv), norm.weight, norm.bias, dtype=norm.weight.dtype)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        if not _plain(norm):
            return super().downsample(x, norm, conv)
        tiles = ops.layer_norm(x, norm.weight, norm.bias, tile=conv.kernel_size[0], dtype=compute_dtype(conv))
        return self._windows(tiles, conv).to(conv.weight.dtype)

    def block(self, x: Tensor, block: nn.Module) -> Tensor:
        layers = (block.dwconv, block.norm, block.pwconv1, block.pwconv2)
        if not all(_plain(layer) for layer in layers):
            return super().block(x, block)
        dwconv, norm, pwconv1, pwconv2 = ((layer.weight, layer.bias) for layer in layers)
        parameters = [*dwconv, *norm, *pwconv1, block.grn.gamma, block.grn.beta, *pwconv2]
        where = (self.visible.slot, self.visible.index, self.visible.offsets_of(block.grn_scope))
        return ops.convnext_block(x, parameters, *where)


def _plain(layer: nn.Module) -> bool:
    """Whether a kernel may read the layer's parameters in its stead: not replaced, not hooked, of the usual epsilon."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    known = type(layer) in (nn.Conv2d, nn.Linear) or (type(layer) is nn.LayerNorm and layer.eps == reference.NORM_EPS)
    return known and not any(hooks)
