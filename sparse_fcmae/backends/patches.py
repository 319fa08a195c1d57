"""What a backend is: how it holds the features of a batch's visible patches, and what it does with them."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.backends.layers import is_tiling, say_called
from sparse_fcmae.ops import context, reference


class Patches(ABC):
    """The visible patches of one batch: B images, each over a grid of rows x cols patches.

    The layers of the network call these methods with their features [..., C]. What `...` is, each backend decides. The
    features of a patch are P x P positions, with P = 8, 4, 2, 1 in the four stages. Where nothing is masked, the first
    dimension goes through the images one after the other, as stochastic depth takes some of them out.

    A layer given to a method may be any module, as `backends.layers` says. One that is not plain is called.
    """

    name: ClassVar[str]
    compilable: ClassVar[bool] = True  # by torch.compile, and captured by CUDA graphs
    dense_backend: ClassVar[str | None] = None  # that runs layers which are dense by design, if not this one

    def __init__(self, mask: Tensor, num_visible: int | None = None) -> None:
        """mask: bool [B, rows, cols], True = masked. num_visible: patches of every image, where that is known."""
        self.mask, self.num_visible = mask, num_visible
        self.masks_nothing = num_visible == mask.shape[1] * mask.shape[2]  # for all that is known

    @staticmethod
    def unusable(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
        """Why this backend can't run features of a dtype on a device, in one line; None where it can."""
        return None

    def of_images(self, count: int) -> "Patches":
        """The patches of so many images, in a batch of which nothing is masked, so that all images look alike."""
        return type(self)(self.mask[:count], self.num_visible)

    @abstractmethod
    def stem(self, images: Tensor, conv: nn.Conv2d, norm: nn.LayerNorm, statistics: Tensor | None = None) -> Tensor:
        """norm(conv(images)) at the visible positions: [B, C, H, W] -> features of the first stage.

        The features have the dtype of the parameters. statistics: by which images are normalised first, as in
        `ops.patch_embed`.
        """

    @abstractmethod
    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        """conv(norm(x)): features of one stage -> features of the next, of the same dtype."""

    @abstractmethod
    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Submanifold 7x7 depthwise convolution: masked positions count as zeros, and have no output."""

    @abstractmethod
    def gelu_grn(self, x: Tensor, gamma: Tensor, beta: Tensor, scope: str) -> Tensor:
        """GRN(GELU(x)), pooled over the visible positions of each "image", or of the whole "batch"."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor:
        """[B, C, rows * P, cols * P] -> features [..., C] of the visible patches."""

    @abstractmethod
    def scatter(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """Features -> [B, C, rows * P, cols * P]; where masked `fill` [C], or zeros."""

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        """A convolution with windows of one position, of features [..., K] of one position a patch."""
        return self.pointwise(x, layer) if is_tiling(layer, 1) else self.called(x, layer, 1)

    def pointwise(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """A plain convolution with windows of one position, of any rows [..., K]."""
        return F.linear(x, layer.weight.flatten(1), layer.bias)

    def called(self, x: Tensor, layer: nn.Module, side: int) -> Tensor:
        """What a layer makes of features by its own forward: called with [B, C, H, W], which is zero where masked.

        side: the positions along a patch of what it makes. Raises ValueError where it makes others.
        """
        say_called(layer)
        return self.gather(self.sized(layer(self.scatter(x)), layer, side))

    def sized(self, x: Tensor, layer: nn.Module, side: int) -> Tensor:
        """What a layer made, [B, C, H, W]. Raises ValueError where that is not side x side positions a patch."""
        size = (self.mask.shape[1] * side, self.mask.shape[2] * side)
        if x.shape[2:] != size:
            raise ValueError(f"the {type(layer).__name__} makes {list(x.shape[2:])} positions, not {list(size)}")
        return x

    def patch_errors(
        self, prediction: Tensor, images: Tensor, rows: Tensor, statistics: Tensor | None, normalised: bool
    ) -> Tensor:
        """The mean squared error of the predictions of the patches `rows`: see `ops.patch_errors`."""
        return reference.patch_errors(prediction, images, rows, statistics, normalised=normalised)

    def fuses(self, dwconv: nn.Module, norm: nn.Module, pwconv1: nn.Module, grn: nn.Module, pwconv2: nn.Module) -> bool:
        """Whether a block of these layers runs as one op, `fused_block`."""
        return False

    def fused_block(self, x: Tensor, parameters: list[Tensor], scope: str) -> Tensor:
        """A whole block as one op, given its ten parameters in the official order."""
        raise NotImplementedError(f"the backend {self.name} runs a block layer by layer")


def zero_masked(images: Tensor, mask: Tensor) -> Tensor:
    """Images [B, C, H, W] with zeros in their masked patches, mask [B, rows, cols]."""
    side = images.shape[2] // mask.shape[1]
    return images.masked_fill(mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None], 0)


def parameter_dtype(*modules: nn.Module) -> torch.dtype:
    """The dtype of the first parameter that one of the modules has."""
    return next(parameter.dtype for module in modules for parameter in module.parameters())


def product_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's matrix products, as its first parameter has them: see `ops.context`."""
    return context.product_dtype(next(module.parameters()))
