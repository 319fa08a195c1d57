"""`masked`: dense convolution with the mask multiplied in, every position computed. The reference and the baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends.layers import is_tiling
from sparse_fcmae.backends.patches import Patches, parameter_dtype
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.ops import reference


class MaskedPatches(Patches):
    """Features are dense, [B, H, W, C]. What stands at masked positions is never read.

    Where it is known that nothing is masked, this is ConvNeXt V2 in plain PyTorch.
    """

    name = "masked"

    def __init__(self, mask: Tensor, num_visible: int | None = None) -> None:
        super().__init__(mask, num_visible)
        self.masks: dict[int, Tensor] = {}  # by positions along a patch

    def stem(self, images: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm, statistics: Tensor | None = None) -> Tensor:
        images = reference.normalise(images, statistics, parameter_dtype(conv)).permute(0, 2, 3, 1).contiguous()
        return norm(self._convolved(self._zero_masked(images), conv, SIDES[0])).to(parameter_dtype(norm, conv))

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        y = norm(x) if is_tiling(conv, 2) else self._zero_masked(norm(x))  # whose windows may reach into other patches
        return self._convolved(y, conv, self._side(x) // 2).to(x.dtype)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return self._convolved(self._zero_masked(x), conv, self._side(x))

    def gelu_grn(self, x: Tensor, gamma: Tensor, beta: Tensor, scope: str) -> Tensor:
        h = F.gelu(x)
        pooled = (0, 1, 2) if scope == "batch" else (1, 2)
        squares = self._zero_masked(h).to(reference.accumulator(h)).square().sum(pooled, keepdim=True)
        return reference.grn(h, reference.grn_scale(squares, gamma.flatten()), beta.flatten())

    def gather(self, x: Tensor) -> Tensor:
        return self._zero_masked(x.permute(0, 2, 3, 1).contiguous())

    def scatter(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        if fill is not None:
            return torch.where(self.mask[..., None], fill, x).permute(0, 3, 1, 2)
        return self._zero_masked(x).permute(0, 3, 1, 2)

    def _zero_masked(self, x: Tensor) -> Tensor:
        if self.masks_nothing:
            return x
        side = self._side(x)
        if side not in self.masks:
            self.masks[side] = self.mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
        return x.masked_fill(self.masks[side], 0)

    def _convolved(self, x: Tensor, conv: nn.Module, side: int) -> Tensor:
        """The convolution of [B, H, W, C], which PyTorch takes as [B, C, H, W] with channels last in memory."""
        return self.sized(conv(x.permute(0, 3, 1, 2)), conv, side).permute(0, 2, 3, 1)

    def _side(self, x: Tensor) -> int:
        """Positions along a patch, or pixels of images."""
        return x.shape[1] // self.mask.shape[1]
