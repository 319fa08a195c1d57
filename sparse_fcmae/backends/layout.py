"""What a backend is: how the features of one batch are laid out, and the encoder's operations on them."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's matrix products: autocast's where that is on, else its parameters'."""
    weight = next(module.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


class Layout(ABC):
    """Features of B images over a grid of rows x cols patches, P x P positions a patch; `...` is the backend's own.

    A backend has to define the abstract methods; what the encoder calls is made of them, and can be overridden whole.
    """

    name: ClassVar[str]
    compilable: ClassVar[bool] = True  # by torch.compile, and captured by CUDA graphs

    def __init__(self, mask: Tensor, kept: int | None = None) -> None:
        """mask: bool [B, rows, cols], True = masked. kept: how many patches every image keeps, where that is known."""
        self.mask, self.kept = mask, kept

    @staticmethod
    def unusable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
        """Why this backend can't run features of a dtype on `device`, in one line; None where it can."""
        return None

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """[B, C, rows * P, cols * P] -> features [..., C] at the visible positions."""

    @abstractmethod
    def leave(self, x: Tensor) -> Tensor:
        """Features of one position a patch -> [B, C, rows, cols], zeros where masked."""

    @abstractmethod
    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A convolution whose stride is its kernel size, so that its windows tile the patches."""

    @abstractmethod
    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Submanifold 7x7 depthwise convolution."""

    @abstractmethod
    def gelu_grn(self, x: Tensor, gamma: Tensor, scope: str) -> Tensor:
        """GELU(x) * (1 + gamma * N), N pooled over the visible positions of each "image" or of the "batch"."""

    def stem(self, images: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
        """Images [B, C, H, W] -> features of the first stage, of the parameters' dtype."""
        return norm(self.tile_conv(self.enter(images), conv)).to(norm.weight.dtype)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        """Features of one stage -> features of the next, of the parameters' dtype."""
        return self.tile_conv(norm(x), conv).to(conv.weight.dtype)

    def block(self, x: Tensor, block: nn.Module) -> Tensor:
        """x + pwconv2(GRN(GELU(pwconv1(LN(dwconv7x7(x)))))), with the layers of an `encoder.Block`."""
        y = block.norm(self.dwconv(x, block.dwconv))
        y = self.gelu_grn(block.pwconv1(y), block.grn.gamma, block.grn_scope)
        # pwconv2(y + beta): beta is folded into the bias, so that it never has to be added to 4 * dim channels
        bias = block.pwconv2.bias + F.linear(block.grn.beta.flatten(), block.pwconv2.weight)
        return x + F.linear(y, block.pwconv2.weight, bias)

    def drop_path(self, x: Tensor, block: nn.Module, rate: float) -> Tensor:
        """`block` for each image with probability 1 - rate, its branch scaled to keep its mean; the others skip it.

        Stochastic depth (Huang et al., 2016), for images of which nothing is masked: any number of them look alike.
        """
        batch = len(self.mask)
        # drawn on the host, which has to know how many there are
        images, scale = (torch.rand(batch) >= rate).nonzero()[:, 0], 1 / (1 - rate)
        if not len(images):  # a gradient of zeros, not none, as processes that train together need
            images, scale = torch.zeros(1, dtype=torch.long), 0.0
        images = images.to(x.device, non_blocking=True)
        rows = x.unflatten(0, (batch, -1))
        before = rows[images].flatten(0, 1)
        after = type(self)(self.mask[: len(images)], self.kept).block(before, block)
        after = torch.lerp(before, after, scale).unflatten(0, (len(images), -1))
        return rows.index_copy(0, images, after).flatten(0, 1)
