"""LayerNorm over the channels, alone: `ops.layer_norm`. A program has whole rows of channels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.kernels.triton.launching import launch, portions
from sparse_fcmae.kernels.triton.tuning import MOST_ROWS, TILES, WARP, tuned

NORM_EPS = tl.constexpr(EPS)
PARTIAL = 1 << 17  # elements of the partial sums: enough programs to fill a GPU


def _suits(config: triton.Config, arguments: dict[str, Any]) -> bool:
    """Enough memory accesses in flight, and registers for what they bring."""
    width, warps = arguments["BLOCK_C"], config.num_warps
    elements = (8,) if warps == 16 else (8, 16)  # of a thread
    rows = [max(1, min(MOST_ROWS, n * WARP * warps // width)) for n in elements]
    return config.kwargs["R"] in rows and warps in [max(1, min(16, width // channels)) for channels in (128, 256)]


@triton.jit
def normalised(z, inside, C: tl.constexpr):
    """z [R, BLOCK_C] less its mean, over its standard deviation, and one over that; 0 where not `inside`, as z is."""
    mean = tl.sum(z, 1) / C
    centred = tl.where(inside, z - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + NORM_EPS)
    return centred * scale[:, None], scale


@triton.jit
def _row_of_tiles(n, S: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr):
    """Where position n's channels begin once windows of TILE x TILE positions lie side by side."""
    x, y, patch = n % S, n // S % S, (n // (S * S)).to(tl.int64)
    window = (patch * (S // TILE) + y // TILE) * (S // TILE) + x // TILE
    return (window * TILE * TILE + y % TILE * TILE + x % TILE) * C


@tuned(TILES, key=["C", "S", "TILE"], suits=_suits)
@triton.jit(do_not_specialize=["positions", "magnitude"])
def layer_norm_kernel(
    x,
    weight,
    bias,
    out,
    positions,
    magnitude,
    C: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.arange(0, BLOCK_C)
    inside = (n < positions)[:, None] & (c < C)[None, :]
    z = tl.load(x + n.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    z, _ = normalised(z, (c < C)[None, :], C)
    z = z * tl.load(weight + c, mask=c < C, other=0.0)[None, :] + tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    tl.store(out + _row_of_tiles(n, S, TILE, C)[:, None] + c[None, :], z, mask=inside)


@tuned(TILES, key=["C", "S", "TILE"], suits=_suits, overwritten=("x",))
@triton.jit(do_not_specialize=["positions", "per_program", "magnitude"])
def layer_norm_backward_kernel(
    x,
    grad,
    weight,
    grad_x,
    partial,
    positions,
    per_program,
    magnitude,
    C: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program j takes positions j * per_program and on, and has row j of partial [programs, 2, C]."""
    c = tl.arange(0, BLOCK_C)
    factor = tl.load(weight + c, mask=c < C, other=0.0)[None, :]
    grad_weight = tl.zeros([R, BLOCK_C], tl.float32)
    grad_bias = tl.zeros([R, BLOCK_C], tl.float32)
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, positions)
    for start in range(first, last, R):
        n = start + tl.arange(0, R)
        inside = (n < last)[:, None] & (c < C)[None, :]
        at = n.to(tl.int64)[:, None] * C + c[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z, scale = normalised(z, (c < C)[None, :], C)
        g = tl.load(grad + _row_of_tiles(n, S, TILE, C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        grad_weight += g * z
        grad_bias += g
        g *= factor
        projection = tl.sum(g * z, 1) / C
        level = tl.sum(g, 1) / C
        tl.store(grad_x + at, (g - level[:, None] - z * projection[:, None]) * scale[:, None], mask=inside)
    row = partial + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(row, tl.sum(grad_weight, 0), mask=c < C)
    tl.store(row + C, tl.sum(grad_bias, 0), mask=c < C)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, tile: int = 1) -> Tensor:
    """Writes to `out` [T, S / tile, S / tile, tile * tile * C] and returns it.

    x [T, S, S, C] and out are of DTYPES, each by itself; weight and bias [C] are float32.
    """
    blocks, side, _, channels = x.shape
    positions = blocks * side * side
    sizes = {"C": channels, "S": side, "TILE": tile, "BLOCK_C": triton.next_power_of_2(channels)}
    grid = lambda tile: (triton.cdiv(positions, tile["R"]),)  # noqa: E731
    launch(layer_norm_kernel, grid, x, weight, bias, out, positions, **sizes)
    return out


def layer_norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, grad_x: Tensor, sums: Tensor, *, tile: int = 1
) -> Tensor:
    """Writes to `grad_x`, which may be x, and returns it; adds weight's and bias's gradients to sums [1, 2, C]."""
    blocks, side, _, channels = x.shape
    positions = blocks * side * side
    programs, per_program = portions(positions, 32, PARTIAL // channels)
    partial = x.new_empty(programs, *sums.shape[1:], dtype=torch.float32)
    sizes = {"C": channels, "S": side, "TILE": tile, "BLOCK_C": triton.next_power_of_2(channels)}
    tensors = (x, grad, weight, grad_x, partial)
    launch(layer_norm_backward_kernel, (programs,), *tensors, positions, per_program, **sizes)
    sums += partial.sum(0)
    return grad_x
