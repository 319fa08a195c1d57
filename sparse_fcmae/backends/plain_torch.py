"""`torch`: the visible patches as a list of small dense blocks [T, P, P, C], in plain PyTorch on any device."""

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends.layers import is_depthwise, is_tiling, say_called
from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.backends.patches import Patches, parameter_dtype, product_dtype, zero_masked
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.ops import reference


class TorchPatches(Patches):
    """The visible patches of the whole batch, sorted by image.

    Only the depthwise convolution looks across the borders of a patch. It runs on a dense canvas; all else runs on the
    visible positions alone.
    """

    name = "torch"

    def __init__(self, mask: Tensor, num_visible: int | None = None) -> None:
        super().__init__(mask, num_visible)
        self.map = PatchMap.of(mask, num_visible)

    def stem(self, images: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm, statistics: Tensor | None = None) -> Tensor:
        dtype = parameter_dtype(norm, conv)
        if not is_tiling(conv):
            say_called(conv)
            images = zero_masked(reference.normalise(images, statistics, parameter_dtype(conv)), self.mask)
            return norm(self.gather(self.sized(conv(images), conv, SIDES[0]))).to(dtype)
        exact = reference.accumulator(conv.weight)
        windows = reference.patch_windows(images, self.map.row_to_patch, statistics, conv.kernel_size[0], exact)
        return norm(conv_of_windows(windows.to(product_dtype(conv)), conv)).to(dtype)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        down = self.tile_conv(norm(x), conv) if is_tiling(conv, 2) else self.called(norm(x), conv, x.shape[1] // 2)
        return down.to(x.dtype)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        if not is_depthwise(conv):
            return self.called(x, conv, x.shape[1])
        return reference.block_dwconv(x, conv.weight, conv.bias, self.map.patch_to_row, self.map.row_to_patch)

    def gelu_grn(self, x: Tensor, gamma: Tensor, beta: Tensor, scope: str) -> Tensor:
        return reference.gelu_grn(x, gamma.flatten(), self.map.pooled(scope), beta.flatten())

    def gather(self, x: Tensor) -> Tensor:
        _, rows, cols = self.mask.shape
        side = x.shape[2] // rows
        of_patches = x.permute(0, 2, 3, 1).unflatten(2, (cols, side)).unflatten(1, (rows, side)).transpose(2, 3)
        of_patches = of_patches.flatten(0, 2)
        return of_patches if self.masks_nothing else of_patches[self.map.row_to_patch]

    def scatter(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        batch, rows, cols = self.mask.shape
        side, channels = x.shape[1], x.shape[3]
        if not self.masks_nothing:
            fill = x.new_zeros(channels) if fill is None else fill
            x = fill.repeat(batch * rows * cols, side, side, 1).index_copy(0, self.map.row_to_patch, x)
        x = x.view(batch, rows, cols, side, side, channels).transpose(2, 3)
        return x.reshape(batch, rows * side, cols * side, channels).permute(0, 3, 1, 2)

    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A convolution whose windows tile the patches: [T, P, P, C] -> [T, P / k, P / k, D]."""
        patches, side, _, channels = x.shape
        k = conv.kernel_size[0]
        windows = x.view(patches, side // k, k, side // k, k, channels).transpose(2, 3)
        return conv_of_windows(windows.reshape(patches, side // k, side // k, k * k * channels), conv)


def conv_of_windows(windows: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution as the matrix product that it is, given each window's row, column and channel in one dimension."""
    return F.linear(windows, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
