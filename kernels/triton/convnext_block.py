"""A ConvNeXt V2 block on a GPU: the whole batch at once. Nothing here reads what a tensor holds, so nothing waits."""

import torch
from torch import Tensor

from sparse_fcmae.kernels.constants import TAPS
from sparse_fcmae.kernels.parameters import BlockParameters, block_gradients
from sparse_fcmae.kernels.triton import zero_sums
from sparse_fcmae.kernels.triton.block_dwconv import block_dwconv, block_dwconv_weight
from sparse_fcmae.kernels.triton.gelu_grn import gelu_grn, gelu_grn_backward
from sparse_fcmae.kernels.triton.layer_norm import layer_norm_backward


def keeps_hidden(channels: int) -> bool:
    """Whether pwconv1's output is kept for the backward pass in a block of so many channels: always."""
    return True


def convnext_block(
    x: Tensor,
    parameters: list[Tensor],
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    image_offsets: Tensor,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass: see `ops.convnext_block`."""
    w = BlockParameters.of(parameters, parameters[4].to(dtype), parameters[8].to(dtype))
    positions = x.numel() // w.channels
    y = x.new_empty(positions, w.channels, dtype=dtype)
    hidden = x.new_empty(positions, w.hidden, dtype=dtype)
    kept = x.new_empty(positions if keep else 0, w.hidden, dtype=dtype)
    before_gelu = kept if keep else hidden
    response = x.new_empty(len(image_offsets) - 1, w.hidden, dtype=torch.float32)
    offsets = image_offsets * (x.shape[1] * x.shape[2])
    block_dwconv(x, w.taps, w.dwconv_bias, patch_to_row, row_to_patch, y, norm=w.norm)
    torch.mm(y, w.weight1.t(), out=before_gelu)
    gelu_grn(before_gelu, w.gamma, offsets, hidden, response, bias=w.bias1, beta=w.beta)
    torch.addmm(w.bias2, hidden, w.weight2.t(), out=y)
    return torch.add(x, y.view(x.shape), out=torch.empty_like(x)), response, kept


def convnext_block_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    image_offsets: Tensor,
    dtype: torch.dtype,
    response: Tensor,
    kept: Tensor,
    frozen: bool,
) -> list[Tensor]:
    """The backward pass: the gradients of x and, unless they are frozen, of the ten parameters."""
    w = BlockParameters.of(parameters, parameters[4].to(dtype), parameters[8].to(dtype))
    positions, maps = x.numel() // w.channels, (patch_to_row, row_to_patch)
    y = x.new_empty(positions, w.channels, dtype=dtype)
    hidden = x.new_empty(positions, w.hidden, dtype=dtype)
    grad_hidden = x.new_empty(positions, w.hidden, dtype=dtype)
    z, grad_x = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x)
    offsets = image_offsets * (x.shape[1] * x.shape[2])

    # the forward pass again, up to pwconv1
    block_dwconv(x, w.taps, w.dwconv_bias, *maps, y, norm=w.norm, convolved=z)
    before_gelu = kept if len(kept) else torch.mm(y, w.weight1.t(), out=hidden)

    g = grad.view(positions, w.channels).to(dtype)
    grad_bias2 = grad.sum((0, 1, 2), dtype=torch.float32)
    torch.mm(g, w.weight2, out=grad_hidden)
    grad_bias1, grad_gamma, grad_beta = hidden_sums = tuple(torch.zeros_like(w.gamma) for _ in range(3))
    pooled = (w.gamma, offsets, response)
    shifts = {"bias": w.bias1, "beta": w.beta}
    gelu_grn_backward(grad_hidden, before_gelu, *pooled, grad_hidden, hidden_sums, out=hidden, **shifts)
    grad_weight1 = grad_weight2 = None
    if not frozen:
        grad_weight2 = _product(g, hidden)
        grad_weight1 = _product(grad_hidden, y)
    torch.mm(grad_hidden, w.weight1, out=y)
    norm_sums, taps_sums = zero_sums(2, w.channels, like=x), zero_sums(TAPS + 1, w.channels, like=x)
    layer_norm_backward(z, y, w.norm[0], z, norm_sums)
    if not frozen:
        block_dwconv_weight(x, z, *maps, taps_sums)
    block_dwconv(z, w.taps.flip(0), None, *maps, grad_x, residual=grad)
    if frozen:
        return [grad_x]
    others = (grad_weight1, grad_bias1, grad_gamma, grad_beta, grad_weight2, grad_bias2)
    return [grad_x, *block_gradients(parameters, taps_sums[0], norm_sums[0], *others)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b as float32; the product itself has the dtype of a and b."""
    product = a.new_empty(a.shape[1], b.shape[1])
    return torch.mm(a.t(), b, out=product).float()  # not out of place, which would heed autocast
