"""What a backend is: how it holds the features of a batch's visible patches, and what it does with them."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.ops import context, reference


class Patches(ABC):
    """The visible patches of one batch: B images, each over a grid of rows x cols patches.

    The layers of the network call these methods with their features [..., C]. What `...` is, each backend decides. The
    features of a patch are P x P positions, with P = 8, 4, 2, 1 in the four stages. Where nothing is masked, the first
    dimension goes through the images one after the other, as stochastic depth takes some of them out.
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

        The convolution's stride is its kernel size, so its windows tile the patches. The features have the dtype of the
        parameters. statistics: by which images are normalised first, as in `ops.patch_embed`.
        """

    @abstractmethod
    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        """conv(norm(x)): features of one stage -> features of the next. Stride and dtype are as in `stem`."""

    @abstractmethod
    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Submanifold 7x7 depthwise convolution: masked positions count as zeros, and have no output."""

    @abstractmethod
    def gelu_grn(self, x: Tensor, gamma: Tensor, beta: Tensor, scope: str) -> Tensor:
        """GRN(GELU(x)), pooled over the visible positions of each "image", or of the whole "batch"."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor:
        """[B, C, rows, cols] -> features [..., C] of the visible patches, one position a patch."""

    @abstractmethod
    def scatter(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """Features of one position a patch -> [B, C, rows, cols]; where masked `fill` [C], or zeros."""

    def linear(self, x: Tensor, layer: nn.Module) -> Tensor:
        """A linear layer, or a convolution with windows of one position, of features [..., K]."""
        return F.linear(x, layer.weight.flatten(1), layer.bias)

    def patch_errors(
        self, prediction: Tensor, images: Tensor, rows: Tensor, statistics: Tensor | None, normalised: bool
    ) -> Tensor:
        """The mean squared error of the predictions of the patches `rows`: see `ops.patch_errors`."""
        return reference.patch_errors(prediction, images, rows, statistics, normalised=normalised)

    def fuses(self, *layers: nn.Module) -> bool:
        """Whether a block of these layers runs as one op, `fused_block`."""
        return False

    def fused_block(self, x: Tensor, parameters: list[Tensor], scope: str) -> Tensor:
        """A whole block as one op, given its ten parameters in the official order."""
        raise NotImplementedError(f"the backend {self.name} runs a block layer by layer")


def product_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's matrix products, as its first parameter has them: see `ops.context`."""
    return context.product_dtype(next(module.parameters()))
