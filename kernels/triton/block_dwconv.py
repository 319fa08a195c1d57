"""Depthwise 7x7 convolution over visible blocks: `ops.block_dwconv`.

The forward kernel's program computes R lines of S positions each, of any patches, in all channels, so that LayerNorm
can follow in registers: a tuple of S tensors [R, BLOCK_C]. For each of the 7 lines that the window reaches it loads
S + 6 positions, each of which serves up to 7 outputs; what successive lines share comes from the caches. Positions of
masked patches are not read at all.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_fcmae.kernels import constants
from sparse_fcmae.kernels.parameters import grid_of
from sparse_fcmae.kernels.triton.launching import launch, portions
from sparse_fcmae.kernels.triton.layer_norm import normalised
from sparse_fcmae.kernels.triton.tuning import TILES, tuned

HALO = tl.constexpr(constants.HALO)
WINDOW = tl.constexpr(constants.WINDOW)
PADDED = tl.constexpr(triton.next_power_of_2(constants.WINDOW))  # taps in a tensor, whose size is a power of 2
PARTIAL = 1 << 16  # elements of the partial sums of each quantity: enough programs to fill a GPU

WEIGHT_TILES = [triton.Config({"BLOCK_C": 32 * w}, num_warps=w) for w in (4, 2)]
# for each S: lines R of a program, and the channels of one of its warps; more does not fit into registers
LINE_TILES = {
    8: ((1, 64), (1, 128), (2, 64)),
    4: ((1, 128), (1, 256), (2, 64), (2, 128)),
    2: ((1, 64), (1, 128), (2, 256)),
    1: ((1, 128), (2, 64)),
}


def _suits(config: triton.Config, arguments: dict[str, Any]) -> bool:
    width, choices = arguments["BLOCK_C"], LINE_TILES[arguments["S"]]
    return (config.kwargs["R"], config.num_warps) in [(r, max(1, min(16, width // c))) for r, c in choices]


@triton.jit
def _centre(patch_to_row, row_to_patch, patch, live, rows, cols):
    """Pointers into patch_to_row, to where it has the patches themselves."""
    flat = tl.load(row_to_patch + patch, mask=live, other=0)
    image, row, col = flat // (rows * cols), flat // cols % rows, flat % cols
    return patch_to_row + (image * (rows + 2 * HALO) + row + HALO) * (cols + 2 * HALO) + col + HALO


@tuned(TILES, key=["C", "S"], suits=_suits)
@triton.jit(do_not_specialize=["blocks", "first", "rows", "cols", "magnitude"])
def block_dwconv_kernel(
    x,
    taps,
    bias,
    norm_weight,
    norm_bias,
    residual,
    patch_to_row,
    row_to_patch,
    convolved,
    out,
    blocks,
    first,
    rows,
    cols,
    magnitude,
    C: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `block_dwconv` below says; bias, norm, residual and convolved can be None."""
    line = tl.program_id(0) * R + tl.arange(0, R)
    patch, y = line // S, line % S
    live = patch < blocks
    c = tl.arange(0, BLOCK_C)
    centre = _centre(patch_to_row, row_to_patch, patch, live, rows, cols)
    sums = (tl.zeros([R, BLOCK_C], tl.float32),) * S
    for dy in range(WINDOW):
        below = y + dy - HALO + HALO * S  # counted from HALO patches above, so that it is not negative
        neighbours = centre + (below // S - HALO) * (cols + 2 * HALO)
        start = below % S * S
        weights = ()
        for dx in tl.static_range(WINDOW):
            weights += (tl.load(taps + (dy * WINDOW + dx) * C + c, mask=c < C, other=0.0)[None, :],)
        for column in tl.static_range(-HALO, S + HALO):
            number = tl.load(neighbours + column // S, mask=live, other=-1)
            position = (number - first).to(tl.int64) * (S * S) + start + column % S
            seen = (number >= 0)[:, None] & (c < C)[None, :]
            value = tl.load(x + position[:, None] * C + c[None, :], mask=seen, other=0.0).to(tl.float32)
            added = ()
            for i in tl.static_range(S):
                if column - i >= -HALO and column - i <= HALO:
                    added += (tl.fma(weights[column - i + HALO], value, sums[i]),)
                else:
                    added += (sums[i],)
            sums = added
    inside = live[:, None] & (c < C)[None, :]
    for i in tl.static_range(S):
        at = (line.to(tl.int64) * S + i)[:, None] * C + c[None, :]
        z = sums[i]
        if bias is not None:
            z += tl.load(bias + c, mask=c < C, other=0.0)[None, :]
        if convolved is not None:
            tl.store(convolved + at, z, mask=inside)
        if norm_weight is not None:
            z, _ = normalised(z, (c < C)[None, :], C)
            z = z * tl.load(norm_weight + c, mask=c < C, other=0.0)[None, :]
            z += tl.load(norm_bias + c, mask=c < C, other=0.0)[None, :]
        if residual is not None:
            z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, z, mask=inside)


@tuned(WEIGHT_TILES, key=["C", "S"])
@triton.jit(do_not_specialize=["blocks", "first", "rows", "cols", "per_program", "magnitude"])
def block_dwconv_weight_kernel(
    x,
    grad,
    patch_to_row,
    row_to_patch,
    partial,
    blocks,
    first,
    rows,
    cols,
    per_program,
    magnitude,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (i, j) takes the BLOCK_C channels i and the lines j * per_program and on; it has row j of partial.

    partial is [programs, 50, C]: 49 taps, bias. The 7 taps of a window's column lie in a tensor of PADDED taps; there
    are 7 such tensors.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dy = tl.arange(0, PADDED)
    sums = (tl.zeros([PADDED, BLOCK_C], tl.float32),) * WINDOW
    bias = tl.zeros([BLOCK_C], tl.float32)
    begin = tl.program_id(1) * per_program
    source = grad + begin.to(tl.int64) * (S * C) + c
    for line in range(begin, tl.minimum(begin + per_program, blocks * S)):
        patch, y = line // S, line % S
        grads = ()
        for i in tl.static_range(S):
            grads += (tl.load(source + ((line - begin) * S + i) * C, mask=c < C, other=0.0).to(tl.float32),)
            bias += grads[i]
        below = y + dy - HALO + HALO * S
        neighbours = _centre(patch_to_row, row_to_patch, patch, True, rows, cols) + (below // S - HALO) * (
            cols + 2 * HALO
        )
        start = below % S * S
        for column in tl.static_range(-HALO, S + HALO):
            number = tl.load(neighbours + column // S, mask=dy < WINDOW, other=-1)
            position = (number - first).to(tl.int64) * (S * S) + start + column % S
            seen = (number >= 0)[:, None] & (c < C)[None, :]
            value = tl.load(x + position[:, None] * C + c[None, :], mask=seen, other=0.0).to(tl.float32)
            added = ()
            for dx in tl.static_range(WINDOW):
                if column + HALO - dx >= 0 and column + HALO - dx < S:
                    added += (tl.fma(grads[column + HALO - dx][None, :], value, sums[dx]),)
                else:
                    added += (sums[dx],)
            sums = added
    row = partial + tl.program_id(1).to(tl.int64) * (WINDOW * WINDOW + 1) * C + c
    for dx in tl.static_range(WINDOW):
        tap = dy * WINDOW + dx
        tl.store(row[None, :] + tap[:, None] * C, sums[dx], mask=(dy < WINDOW)[:, None] & (c < C)[None, :])
    tl.store(row + WINDOW * WINDOW * C, bias, mask=c < C)


def block_dwconv(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    patch_to_row: Tensor,
    row_to_patch: Tensor,
    out: Tensor,
    *,
    first: int = 0,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    residual: Tensor | None = None,
    convolved: Tensor | None = None,
) -> Tensor:
    """Writes convolution + residual to `out` and returns it.

    With norm = (weight, bias) `out` is the LayerNorm of the convolution instead, which itself goes to `convolved` if
    that is given. x [T, S, S, C] and out are of DTYPES, each by itself; residual has out's dtype; all else is float32:
    taps [49, C], bias [C].
    """
    blocks, side, _, channels = x.shape
    place = (patch_to_row.contiguous(), row_to_patch[first:].contiguous())
    tensors = (x, taps, bias, *norm, residual, *place, convolved, out)
    sizes = {"C": channels, "S": side, "BLOCK_C": triton.next_power_of_2(channels)}
    grid = lambda tile: (triton.cdiv(blocks * side, tile["R"]),)  # noqa: E731
    launch(block_dwconv_kernel, grid, *tensors, blocks, first, *grid_of(patch_to_row), **sizes)
    return out


def block_dwconv_weight(
    x: Tensor, grad: Tensor, patch_to_row: Tensor, row_to_patch: Tensor, sums: Tensor, *, first: int = 0
) -> None:
    """Adds the gradients of the taps, then of the bias, to sums [1, 50, C]; grad is of DTYPES, shaped as x."""
    blocks, side, _, channels = x.shape
    lines = blocks * side
    programs, per_program = portions(lines, 8, PARTIAL // channels)
    partial = x.new_empty(programs, *sums.shape[1:], dtype=torch.float32)
    tensors = (x, grad, patch_to_row.contiguous(), row_to_patch[first:].contiguous(), partial)
    grid = lambda tile: (triton.cdiv(channels, tile["BLOCK_C"]), programs)  # noqa: E731
    sizes = (blocks, first, *grid_of(patch_to_row), per_program)
    launch(block_dwconv_weight_kernel, grid, *tensors, *sizes, C=channels, S=side)
    sums += partial.sum(0)
