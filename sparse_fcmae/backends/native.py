"""`native`: the visible patches as blocks [T, P, P, C], by this package's own kernels: C++ on CPUs, Triton on GPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae import kernels, ops
from sparse_fcmae.backends.layers import is_depthwise, is_linear, is_norm, is_tiling, is_unhooked, say_called
from sparse_fcmae.backends.patches import product_dtype
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.kernels.parameters import PIXEL_DTYPES


class NativePatches(TorchPatches):
    """As `torch`, with the ops in place of their references, and a whole block as one op."""

    name = "native"

    @staticmethod
    def unusable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
        return kernels.unusable(device) or kernels.unfit(device, dtype)

    def stem(self, images: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm, statistics: Tensor | None = None) -> Tensor:
        if not is_norm(norm):
            say_called(norm)
        if not is_tiling(conv) or not is_norm(norm) or images.requires_grad:
            return super().stem(images, conv, norm, statistics)
        parameters = (conv.weight, conv.bias, norm.weight, norm.bias)
        return ops.patch_embed(readable(images), *parameters, self.map.row_to_patch, statistics)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        if not is_norm(norm):
            say_called(norm)
        if not is_norm(norm) or not is_tiling(conv, 2):
            return super().downsample(x, norm, conv)
        windows = ops.layer_norm(x, norm.weight, norm.bias, tile=2, dtype=product_dtype(conv))
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        return self._linear(windows, weight, conv.bias).to(x.dtype)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        if not is_depthwise(conv):
            return super().dwconv(x, conv)
        return ops.block_dwconv(x, conv.weight, conv.bias, self.map.patch_to_row, self.map.row_to_patch)

    def gelu_grn(self, x: Tensor, gamma: Tensor, beta: Tensor, scope: str) -> Tensor:
        return ops.gelu_grn(x, gamma.flatten(), self.map.pooled(scope), beta.flatten())

    def pointwise(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        return self._linear(x, layer.weight.flatten(1), layer.bias)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        on_cpu = kernels.platform(x.device) == "cpu"  # where there is more than one way to compute it
        return ops.linear(x, weight, bias) if on_cpu else F.linear(x, weight, bias)

    def patch_errors(
        self, prediction: Tensor, images: Tensor, rows: Tensor, statistics: Tensor | None, normalised: bool
    ) -> Tensor:
        if images.requires_grad:
            return super().patch_errors(prediction, images, rows, statistics, normalised)
        return ops.patch_errors(prediction, readable(images), rows, statistics, normalised=normalised)

    def fuses(self, dwconv: nn.Module, norm: nn.Module, pwconv1: nn.Module, grn: nn.Module, pwconv2: nn.Module) -> bool:
        plain = {
            dwconv: is_depthwise(dwconv),
            norm: is_norm(norm),
            pwconv1: is_linear(pwconv1),
            grn: is_unhooked(grn),
            pwconv2: is_linear(pwconv2),
        }
        for layer, as_usual in plain.items():
            if not as_usual:
                say_called(layer)
        return all(plain.values())

    def fused_block(self, x: Tensor, parameters: list[Tensor], scope: str) -> Tensor:
        maps = (self.map.patch_to_row, self.map.row_to_patch, self.map.pooled(scope))
        return ops.convnext_block(x, parameters, *maps)


def readable(images: Tensor) -> Tensor:
    """The images in a dtype that the kernels read."""
    return images if images.dtype in PIXEL_DTYPES else images.float()
