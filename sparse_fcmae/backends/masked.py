"""`masked`: dense convolution with the mask multiplied in, every position computed: the reference and the baseline."""

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends.layout import Layout
from sparse_fcmae.ops import reference


class MaskedLayout(Layout):
    """Features are dense, [B, H, W, C]; what stands at masked positions is never read. Plain PyTorch if all is kept."""

    name = "masked"

    def __init__(self, mask: Tensor, kept: int | None = None) -> None:
        super().__init__(mask, kept)
        self.hides = kept != mask.shape[1] * mask.shape[2]
        self.masks: dict[int, Tensor] = {}  # by positions along a patch

    def enter(self, x: Tensor) -> Tensor:
        return self._hide(x.permute(0, 2, 3, 1).contiguous())

    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return self._conv(x, conv)

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return self._conv(self._hide(x), conv)

    def gelu_grn(self, x: Tensor, gamma: Tensor, scope: str) -> Tensor:
        h = F.gelu(x)
        pooled = (0, 1, 2) if scope == "batch" else (1, 2)
        squares = self._hide(h).to(reference.accumulator(h)).square().sum(pooled, keepdim=True)
        return h * reference.grn_scale(squares, gamma.flatten()).to(h.dtype)

    def leave(self, x: Tensor) -> Tensor:
        return self._hide(x).permute(0, 3, 1, 2)

    @staticmethod
    def _conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _hide(self, x: Tensor) -> Tensor:
        if not self.hides:
            return x
        side = x.shape[1] // self.mask.shape[1]
        if side not in self.masks:
            self.masks[side] = self.mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]
        return x.masked_fill(self.masks[side], 0)
