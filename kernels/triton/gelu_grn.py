"""GELU and global response normalisation: `ops.gelu_grn`.

A pass over the features sums for each image and channel, a small kernel turns an image's sums into factors, and a
second pass applies these. GELU is computed in both passes: that costs less than to store it. In the passes program
(b, j, i) takes image b's positions j * R to j * R + R, then those programs * R further on, in the BLOCK_H channels i.
What reads the programs' sums adds them up itself, as a launch takes longer than that.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.kernels.triton.launching import launch
from sparse_fcmae.kernels.triton.tuning import tuned

GRN_EPS = tl.constexpr(EPS)
GAUSS = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# erfc(x) = (A1 t + ... + A5 t^5) exp(-x^2), t = 1 / (1 + P x): Abramowitz and Stegun, 7.1.26, with an error below 2e-7;
# P is for x / sqrt(2), and the other factors are halved
P = tl.constexpr(0.3275911 * 0.7071067811865476)
A1, A2, A3 = tl.constexpr(0.127414796), tl.constexpr(-0.142248368), tl.constexpr(0.7107068705)
A4, A5 = tl.constexpr(-0.7265760135), tl.constexpr(0.5307027145)

TILES = [
    triton.Config({"R": r, "BLOCK_H": h}, num_warps=w)
    for r, h, w in ((16, 128, 4), (16, 64, 4), (8, 128, 4), (4, 256, 4))
]
BLOCK = tl.constexpr(1024)  # channels that the kernels for whole images take at a time
POSITIONS = 128  # that a program takes of an image, or more
MOST_PROGRAMS = 4096  # of an image


@triton.jit
def _gelu(x):
    """GELU(x) and its derivative, by one exponential: these passes are bound by arithmetic where erf takes its own."""
    bell = tl.exp(-0.5 * x * x)
    t = 1 / (1 + P * tl.abs(x))
    tail = ((((A5 * t + A4) * t + A3) * t + A2) * t + A1) * t * bell
    below = tl.where(x < 0, tail, 1 - tail)
    return x * below, below + x * GAUSS * bell


@triton.jit
def _shift(row, c, inside):
    """A row [H] that is added, or 0 for None."""
    return 0.0 if row is None else tl.load(row + c, mask=inside, other=0.0)[None, :]


@tuned(TILES, key=["H"])
@triton.jit(do_not_specialize=["magnitude"])
def squares_kernel(x, bias, offsets, partial, magnitude, H: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr):
    """partial [B, programs, H]: sums of GELU(x + bias) squared."""
    b, j, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    shift, last = _shift(bias, c, c < H), tl.load(offsets + b + 1)
    total = tl.zeros([R, BLOCK_H], tl.float32)
    for start in range(tl.load(offsets + b) + j * R, last, programs * R):
        n = start + tl.arange(0, R)
        inside = (n < last)[:, None] & (c < H)[None, :]
        value = tl.load(x + n.to(tl.int64)[:, None] * H + c[None, :], mask=inside, other=0.0).to(tl.float32)
        h, _ = _gelu(value + shift)
        total += tl.where(inside, h * h, 0.0)
    tl.store(partial + (b.to(tl.int64) * programs + j) * H + c, tl.sum(total, 0), mask=c < H)


@triton.jit
def _total(partial, programs, c, H: tl.constexpr):
    """Sums [BLOCK] over the programs, in the channels c of this program's image; 0 beyond the last channel."""
    row = tl.program_id(0).to(tl.int64) * programs * H
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(programs):
        total += tl.load(partial + row + j * H + c, mask=c < H, other=0.0)
    return total


@triton.jit(do_not_specialize=["programs"])
def response_kernel(partial, gamma, norm, scale, programs, H: tl.constexpr):
    """norm [B, H], the root of the sums of squares, and scale = 1 + gamma * norm / (mean of norm + eps)."""
    row = tl.program_id(0).to(tl.int64) * H
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        total += tl.sqrt_rn(_total(partial, programs, start + tl.arange(0, BLOCK), H))
    mean = tl.sum(total, 0) / H + GRN_EPS
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        response = tl.sqrt_rn(_total(partial, programs, c, H))
        tl.store(norm + row + c, response, mask=c < H)
        factor = 1 + tl.load(gamma + c, mask=c < H, other=0.0) * response / mean
        tl.store(scale + row + c, factor, mask=c < H)


@tuned(TILES, key=["H"], overwritten=("x",))
@triton.jit(do_not_specialize=["magnitude"])
def scale_kernel(
    x, bias, scale, beta, offsets, out, magnitude, H: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr
):
    """out = GELU(x + bias) * scale + beta."""
    b, j, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    shift, last = _shift(bias, c, c < H), tl.load(offsets + b + 1)
    factor = tl.load(scale + b.to(tl.int64) * H + c, mask=c < H, other=0.0)[None, :]
    level = _shift(beta, c, c < H)
    for start in range(tl.load(offsets + b) + j * R, last, programs * R):
        n = start + tl.arange(0, R)
        inside = (n < last)[:, None] & (c < H)[None, :]
        at = n.to(tl.int64)[:, None] * H + c[None, :]
        h, _ = _gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift)
        tl.store(out + at, h * factor + level, mask=inside)


@tuned(TILES, key=["H"])
@triton.jit(do_not_specialize=["magnitude"])
def products_kernel(
    grad, x, bias, offsets, products, sums, magnitude, H: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr
):
    """products and sums [B, programs, H]: of grad * GELU(x + bias), and of grad."""
    b, j, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    shift, last = _shift(bias, c, c < H), tl.load(offsets + b + 1)
    product = tl.zeros([R, BLOCK_H], tl.float32)
    total = tl.zeros([R, BLOCK_H], tl.float32)
    for start in range(tl.load(offsets + b) + j * R, last, programs * R):
        n = start + tl.arange(0, R)
        inside = (n < last)[:, None] & (c < H)[None, :]
        at = n.to(tl.int64)[:, None] * H + c[None, :]
        h, _ = _gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        product += g * h
        total += g
    row = (b.to(tl.int64) * programs + j) * H + c
    tl.store(products + row, tl.sum(product, 0), mask=c < H)
    tl.store(sums + row, tl.sum(total, 0), mask=c < H)


@triton.jit(do_not_specialize=["programs"])
def coupling_kernel(products, gamma, norm, scale, coupling, programs, H: tl.constexpr):
    """Writes two factors of each image and channel, both [B, H], and turns products into parts of gamma's gradient.

    scale: the forward pass's. coupling: the gradient of h = GELU(x + bias) is grad * scale + h * coupling, whose second
    term comes from the norm.
    """
    row = tl.program_id(0).to(tl.int64) * H
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        response = tl.load(norm + row + c, mask=c < H, other=0.0)
        total += response
        factor = tl.load(gamma + c, mask=c < H, other=0.0)
        dot += _total(products, programs, c, H) * factor * response
    mean = tl.sum(total, 0) / H + GRN_EPS
    of_mean = tl.sum(dot, 0) / (H * mean * mean)
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        response = tl.load(norm + row + c, mask=c < H, other=0.0)
        factor = tl.load(gamma + c, mask=c < H, other=0.0)
        product = _total(products, programs, c, H)
        tl.store(scale + row + c, 1 + factor * response / mean, mask=c < H)
        for j in range(programs):
            at = products + row * programs + j * H + c
            tl.store(at, tl.load(at, mask=c < H, other=0.0) * response / mean, mask=c < H)
        # the norm's gradient at zero is taken as zero
        grad_norm = tl.where(response == 0, 0.0, product * factor / mean - of_mean)
        tl.store(coupling + row + c, grad_norm / tl.where(response == 0, 1.0, response), mask=c < H)


@tuned(TILES, key=["H"], overwritten=("grad", "x"))
@triton.jit(do_not_specialize=["magnitude"])
def unscale_kernel(
    grad,
    x,
    bias,
    scale,
    coupling,
    beta,
    offsets,
    grad_x,
    out,
    partial,
    magnitude,
    H: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """grad_x, its sums in partial [B, programs, H], and the forward pass's out; grad_x may be grad."""
    b, j, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    shift, last = _shift(bias, c, c < H), tl.load(offsets + b + 1)
    row = b.to(tl.int64) * H + c
    factor = tl.load(scale + row, mask=c < H, other=0.0)[None, :]
    coupled = tl.load(coupling + row, mask=c < H, other=0.0)[None, :]
    level = _shift(beta, c, c < H)
    total = tl.zeros([R, BLOCK_H], tl.float32)
    for start in range(tl.load(offsets + b) + j * R, last, programs * R):
        n = start + tl.arange(0, R)
        inside = (n < last)[:, None] & (c < H)[None, :]
        at = n.to(tl.int64)[:, None] * H + c[None, :]
        h, derivative = _gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(inside, (g * factor + h * coupled) * derivative, 0.0)
        total += g
        tl.store(grad_x + at, g, mask=inside)
        tl.store(out + at, h * factor + level, mask=inside)
    tl.store(partial + (b.to(tl.int64) * programs + j) * H + c, tl.sum(total, 0), mask=c < H)


def gelu_grn(
    x: Tensor,
    gamma: Tensor,
    offsets: Tensor,
    out: Tensor,
    norm: Tensor,
    *,
    bias: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Writes to `out`, which may be x, and returns it; writes what the backward pass needs to norm [B, H].

    norm has the norm of each channel after GELU over each image's positions.

    x [N, H] is of DTYPES; bias [H], which is added to x, gamma and beta [H] are float32. offsets int64 [B + 1]: image b
    has the positions offsets[b] to offsets[b + 1].
    """
    (partial,), grid = _passes(x, offsets, 1)
    scale, channels = torch.empty_like(norm), x.shape[-1]
    launch(squares_kernel, grid, x, bias, offsets, partial, H=channels)
    launch(response_kernel, (len(norm),), partial, gamma, norm, scale, partial.shape[1], H=channels)
    launch(scale_kernel, grid, x, bias, scale, beta, offsets, out, H=channels)
    return out


def gelu_grn_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    offsets: Tensor,
    norm: Tensor,
    grad_x: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    *,
    out: Tensor,
    scratch: Tensor | None = None,
    bias: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Writes to `grad_x`, which may be grad, and returns it; writes the forward pass's result to `out` once more.

    out may be x. Adds the gradients of bias (the sum of grad_x over all positions), gamma and beta to sums, [H] each.
    No scratch memory is needed.
    """
    partial, grid = _passes(x, offsets, 3)
    of_bias, products, of_beta = partial
    scale, coupling, channels = torch.empty_like(norm), torch.empty_like(norm), x.shape[-1]
    launch(products_kernel, grid, grad, x, bias, offsets, products, of_beta, H=channels)
    launch(coupling_kernel, (len(norm),), products, gamma, norm, scale, coupling, products.shape[1], H=channels)
    tensors = (grad, x, bias, scale, coupling, beta, offsets, grad_x, out, of_bias)
    launch(unscale_kernel, grid, *tensors, H=channels)
    torch._foreach_add_(sums, partial.sum((1, 2)).unbind())
    return grad_x


def _passes(x: Tensor, offsets: Tensor, sums: int) -> tuple[Tensor, Any]:
    """Partial sums [sums, B, programs, H] and the grid of gelu_grn's passes, for images of about the same size."""
    images, channels = len(offsets) - 1, x.shape[-1]
    programs = max(1, min(MOST_PROGRAMS, triton.cdiv(len(x), max(1, images) * POSITIONS)))
    partial = x.new_empty(sums, images, programs, channels, dtype=torch.float32)
    return partial, lambda tile: (images, programs, triton.cdiv(channels, tile["BLOCK_H"]))
