"""`masked`: dense convolution with the mask multiplied in, every position computed. The reference and the baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends.patches import Patches
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
        images = reference.normalise(images, statistics, conv.weight.dtype).permute(0, 2, 3, 1).contiguous()
        return norm(_channels_last(conv, self._zero_masked(images))).to(norm.weight.dtype)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        return _channels_last(conv, norm(x)).to(conv.weight.dtype)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return _channels_last(conv, self._zero_masked(x))

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
        side = x.shape[1] // self.mask.shape[1]
        if side not in self.masks:
            self.masks[side] = self.mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
        return x.masked_fill(self.masks[side], 0)


def _channels_last(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution of [B, H, W, C], which PyTorch takes as [B, C, H, W] with channels last in memory."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
