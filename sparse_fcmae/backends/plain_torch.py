"""`torch`: the visible patches as a list of small dense blocks [T, P, P, C], in plain PyTorch on any device."""

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.backends.patches import Patches, product_dtype
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
        dtype = reference.accumulator(conv.weight)
        windows = reference.patch_windows(images, self.map.row_to_patch, statistics, conv.kernel_size[0], dtype)
        return norm(conv_of_windows(windows.to(product_dtype(conv)), conv)).to(norm.weight.dtype)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        return self.tile_conv(norm(x), conv).to(conv.weight.dtype)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return reference.block_dwconv(x, conv.weight, conv.bias, self.map.patch_to_row, self.map.row_to_patch)

    def gelu_grn(self, x: Tensor, gamma: Tensor, beta: Tensor, scope: str) -> Tensor:
        return reference.gelu_grn(x, gamma.flatten(), self.map.pooled(scope), beta.flatten())

    def gather(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).flatten(0, 2)
        return (x if self.masks_nothing else x[self.map.row_to_patch])[:, None, None]

    def scatter(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        batch, rows, cols = self.mask.shape
        x = x.flatten(0, 2)
        if not self.masks_nothing:
            fill = x.new_zeros(x.shape[-1]) if fill is None else fill
            x = fill.repeat(batch * rows * cols, 1).index_copy(0, self.map.row_to_patch, x)
        return x.view(batch, rows, cols, x.shape[-1]).permute(0, 3, 1, 2)

    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A convolution whose windows tile the patches: [T, P, P, C] -> [T, P / k, P / k, D]."""
        patches, side, _, channels = x.shape
        k = conv.kernel_size[0]
        windows = x.view(patches, side // k, k, side // k, k, channels).transpose(2, 3)
        return conv_of_windows(windows.reshape(patches, side // k, side // k, k * k * channels), conv)


def conv_of_windows(windows: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution as the matrix product that it is, given each window's row, column and channel in one dimension."""
    return F.linear(windows, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
