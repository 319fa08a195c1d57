"""A ConvNeXt V2 block on the CPU: a few images at a time, so that the wide features stay in the caches.

Between its layers a block holds several times its input, most of it 4 C channels wide. Memory of that size is far
slower than a CPU's caches. So both passes take the images in chunks whose wide features fit in the caches, and all
chunks use the same scratch memory. The backward pass computes again what was not kept. An image larger than a chunk is
a chunk of its own, and so is a batch that GRN pools over as a whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fcmae.kernels.constants import TAPS
from sparse_fcmae.kernels.cpu import zero_sums
from sparse_fcmae.kernels.cpu.block_dwconv import block_dwconv, block_dwconv_weight
from sparse_fcmae.kernels.cpu.gelu_grn import gelu_grn, gelu_grn_backward
from sparse_fcmae.kernels.cpu.layer_norm import layer_norm_backward
from sparse_fcmae.kernels.cpu.products import add_weight_gradient, linear, linear_input_gradient
from sparse_fcmae.kernels.cpu.scratch import buffer, cast
from sparse_fcmae.kernels.parameters import BlockParameters, block_gradients

CHUNK_BYTES = 4 << 20  # of wide features in a chunk; with fewer the matrix products get too small to be efficient
KEEP_CHANNELS = 96  # from this width on, reading pwconv1's output again is faster than computing it again


def keeps_hidden(channels: int) -> bool:
    """Whether pwconv1's output is kept for the backward pass in a block of so many channels."""
    return channels >= KEEP_CHANNELS


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
    w = _in_dtype(parameters, dtype)
    out = torch.empty_like(x)
    response = x.new_empty(len(image_offsets) - 1, w.hidden, dtype=torch.float32)
    kept = x.new_empty(x.numel() // w.channels if keep else 0, w.hidden, dtype=dtype)
    for chunk in _chunks(x, image_offsets, w.hidden, dtype):
        features = x[chunk.patches]
        y = buffer("y", chunk.size, w.channels, dtype)
        scratch = buffer("hidden", chunk.size, w.hidden, dtype)
        maps = (patch_to_row, row_to_patch)
        block_dwconv(features, w.taps, w.dwconv_bias, *maps, y, first=chunk.patches.start, norm=w.norm)
        hidden = linear(y, w.weight1, out=kept[chunk.positions] if keep else scratch)
        if keep and hidden.data_ptr() != kept[chunk.positions].data_ptr():
            kept[chunk.positions] = hidden
        norm = response[chunk.images]
        gelu_grn(hidden, w.gamma, chunk.offsets, scratch, norm, bias=w.bias1, beta=w.beta)
        added = linear(scratch, w.weight2, out=y, bias=w.bias2)
        torch.add(features, added.view(features.shape), out=out[chunk.patches])
    return out, response, kept


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
    w = _in_dtype(parameters, dtype)
    maps, reversed_taps, grad_x = (patch_to_row, row_to_patch), w.taps.flip(0), torch.empty_like(x)
    taps_sums, norm_sums = zero_sums(TAPS + 1, w.channels, like=x), zero_sums(2, w.channels, like=x)
    grad_bias1, grad_gamma, grad_beta = hidden_sums = tuple(torch.zeros_like(w.gamma) for _ in range(3))
    grad_bias2 = torch.zeros_like(w.dwconv_bias)
    grad_weight1 = grad_weight2 = None
    for chunk in _chunks(x, image_offsets, w.hidden, dtype):
        size, features, first = chunk.size, x[chunk.patches], chunk.patches.start
        grad_out = grad[chunk.patches]
        y = buffer("y", size, w.channels, dtype)
        hidden = buffer("hidden", size, w.hidden, dtype)
        scratch = buffer("derivative", size, w.hidden, dtype)
        z = buffer("z", size, w.channels, torch.float32).view(features.shape)

        # the forward pass again, up to pwconv1
        block_dwconv(features, w.taps, w.dwconv_bias, *maps, y, first=first, norm=w.norm, convolved=z)
        if len(kept):
            before_gelu = kept[chunk.positions]
        else:
            before_gelu = scratch = linear(y, w.weight1, out=scratch)

        g = cast("g", grad_out.view(size, w.channels), dtype)
        grad_bias2 += grad_out.sum((0, 1, 2), dtype=torch.float32)
        grad_hidden = linear_input_gradient(g, w.weight2, out=buffer("grad_hidden", size, w.hidden, dtype))
        gelu_grn_backward(
            grad_hidden,
            before_gelu,
            w.gamma,
            chunk.offsets,
            response[chunk.images],
            grad_hidden,
            hidden_sums,
            out=hidden,
            scratch=scratch,
            bias=w.bias1,
            beta=w.beta,
        )
        if not frozen:
            grad_weight2 = add_weight_gradient(grad_weight2, g, hidden)
            grad_weight1 = add_weight_gradient(grad_weight1, grad_hidden, y)
        grad_y = linear_input_gradient(grad_hidden, w.weight1, out=y)
        layer_norm_backward(z, grad_y, w.norm[0], z, norm_sums)
        if not frozen:
            block_dwconv_weight(features, z, *maps, taps_sums, first=first)
        block_dwconv(z, reversed_taps, None, *maps, grad_x[chunk.patches], first=first, residual=grad_out)
    if frozen:
        return [grad_x]
    others = (grad_weight1, grad_bias1, grad_gamma, grad_beta, grad_weight2, grad_bias2)
    return [grad_x, *block_gradients(parameters, taps_sums.sum(0), norm_sums.sum(0), *others)]


def _in_dtype(parameters: list[Tensor], dtype: torch.dtype) -> BlockParameters:
    matrices = (cast(name, parameters[i], dtype) for name, i in (("weight1", 4), ("weight2", 8)))
    return BlockParameters.of(parameters, *matrices)


class _Chunk(NamedTuple):
    """Successive images: their numbers, their patches and positions in the batch, and their offsets in positions."""

    images: slice
    patches: slice
    positions: slice
    offsets: Tensor

    @property
    def size(self) -> int:
        return self.positions.stop - self.positions.start


def _chunks(x: Tensor, image_offsets: Tensor, hidden: int, dtype: torch.dtype) -> list[_Chunk]:
    """The batch in chunks of as many images as CHUNK_BYTES hold the wide features of, at least one."""
    area, images = x.shape[1] * x.shape[2], len(image_offsets) - 1
    limit = CHUNK_BYTES // (max(1, hidden) * dtype.itemsize * area)  # patches
    ends, offsets, chunks, begin = image_offsets.tolist(), image_offsets * area, [], 0
    while begin < images:
        end = begin + 1
        while end < images and ends[end + 1] - ends[begin] <= limit:
            end += 1
        first, last = ends[begin], ends[end]
        positions = slice(first * area, last * area)
        chunks.append(_Chunk(slice(begin, end), slice(first, last), positions, offsets[begin : end + 1]))
        begin = end
    return chunks
