"""Parameters and sizes in the form in which kernels read them, and gradients in the form in which they write them."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fcmae.kernels.constants import HALO, TAPS

# that images' pixels are stored in; C++ knows them by their numbers here, see pixels.h
PIXEL_DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.float16, torch.float32)


def taps_of(weight: Tensor) -> Tensor:
    """A depthwise convolution's weight [C, 1, 7, 7] as float32 [49, C], contiguous."""
    return weight.flatten(1).t().float().contiguous()


def weight_gradient_of(sums: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `weight` [C, 1, 7, 7] from the gradients of taps and bias, [50, C]."""
    return sums[:TAPS].t().reshape(weight.shape).to(weight.dtype)


def stem_matrix_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The stem's weight [D, C, k, k] as the matrix [D, k * k * C] that windows are multiplied by."""
    return weight.permute(0, 2, 3, 1).flatten(1).to(dtype)


def stem_gradient_of(matrix: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the stem's weight from that of its matrix, of the weight's dtype, contiguous."""
    outputs, channels, k, _ = weight.shape
    gradient = matrix.view(outputs, k, k, channels).permute(0, 3, 1, 2)
    return gradient.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)


def row_of(parameter: Tensor | None) -> Tensor | None:
    """A parameter [C] as float32, contiguous."""
    return None if parameter is None else parameter.float().contiguous()


def grid_of(patch_to_row: Tensor) -> tuple[int, int]:
    """Rows and columns of an image's patches from the map [B, rows + 6, cols + 6], which has a border around them."""
    return patch_to_row.shape[1] - 2 * HALO, patch_to_row.shape[2] - 2 * HALO


class BlockParameters(NamedTuple):
    """The parameters of a ConvNeXt V2 block of C channels: float32, except the matrices and what is added to products.

    taps [49, C], dwconv_bias [C], norm: weight and bias [C] each, weight1 [4 C, C], bias1, gamma and beta [4 C],
    weight2 [C, 4 C], bias2 [C]. weight1, weight2 and bias2 are in the dtype of the matrix products.
    """

    taps: Tensor
    dwconv_bias: Tensor
    norm: tuple[Tensor, Tensor]
    weight1: Tensor
    bias1: Tensor
    gamma: Tensor
    beta: Tensor
    weight2: Tensor
    bias2: Tensor

    @classmethod
    def of(cls, parameters: list[Tensor], weight1: Tensor, weight2: Tensor) -> "BlockParameters":
        """From the block's ten parameters in the official order; the matrices are given in the products' dtype."""
        dwconv_weight, dwconv_bias, norm_weight, norm_bias, _, bias1, gamma, beta, _, bias2 = parameters
        return cls(
            taps=taps_of(dwconv_weight),
            dwconv_bias=row_of(dwconv_bias),
            norm=(row_of(norm_weight), row_of(norm_bias)),
            weight1=weight1,
            bias1=row_of(bias1),
            gamma=row_of(gamma.flatten()),
            beta=row_of(beta.flatten()),
            weight2=weight2,
            bias2=bias2.to(weight2.dtype),
        )

    @property
    def channels(self) -> int:
        return self.weight1.shape[1]

    @property
    def hidden(self) -> int:
        """Channels between the pointwise layers."""
        return self.weight1.shape[0]


def block_gradients(parameters: list[Tensor], taps: Tensor, norm: Tensor, *others: Tensor | None) -> list[Tensor]:
    """The gradients of a block's ten parameters, each of its parameter's shape and dtype, contiguous.

    taps: of the 49 taps, then of the bias, float32 [50, C]. norm: of its weight and bias, float32 [2, C]. others: of
    weight1, bias1, gamma, beta, weight2 and bias2. A gradient that is None, for want of any position, is zero.
    """
    found = [weight_gradient_of(taps, parameters[0]), taps[TAPS], norm[0], norm[1], *others]
    return [_as_gradient(gradient, parameter) for gradient, parameter in zip(found, parameters, strict=True)]


def _as_gradient(total: Tensor | None, parameter: Tensor) -> Tensor:
    if total is None:
        return torch.zeros_like(parameter)
    if not (total.is_contiguous() and total.untyped_storage().nbytes() == total.nbytes):  # part of others' sums
        total = total.clone(memory_format=torch.contiguous_format)
    return total.to(parameter.dtype).view(parameter.shape)
