"""GELU and global response normalisation: `ops.gelu_grn`.

A pass over the features sums for each image and channel, a small kernel turns an image's sums into factors, and a
second pass applies these. GELU is computed in both passes: that costs less than to store it. In the passes program
(b, j, i) takes image b's positions j * R to j * R + R, then those programs * R further on, in the BLOCK_H channels i.
"""

import triton
import triton.language as tl

from sparse_fcmae.kernels.triton.tuning import tuned

GRN_EPS = tl.constexpr(1e-6)
SQRT_HALF = tl.constexpr(0.7071067811865476)
GAUSS = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)

TILES = [
    triton.Config({"R": r, "BLOCK_H": h}, num_warps=w)
    for r, h, w in ((16, 128, 4), (16, 64, 4), (8, 128, 4), (4, 256, 4))
]
BLOCK = tl.constexpr(1024)  # channels that the kernels for whole images take at a time


@triton.jit
def _gelu(x):
    """GELU(x) and its derivative."""
    below = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
    return x * below, below + x * GAUSS * tl.exp(-0.5 * x * x)


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
def response_kernel(squares, gamma, norm, scale, H: tl.constexpr):
    """norm [B, H], the root of squares, and scale = 1 + gamma * norm / (mean of norm + eps)."""
    row = tl.program_id(0).to(tl.int64) * H
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total += tl.sqrt_rn(tl.load(squares + row + c, mask=c < H, other=0.0))
    mean = tl.sum(total, 0) / H + GRN_EPS
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        response = tl.sqrt_rn(tl.load(squares + row + c, mask=c < H, other=0.0))
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


@triton.jit
def pull_kernel(products, gamma, norm, scale, pull, grad_gamma, H: tl.constexpr):
    """Of each image, all [B, H]: the forward pass's scale; what its norm's gradient adds to that of GELU's result, over
    that result; its share in the gradient of gamma."""
    row = tl.program_id(0).to(tl.int64) * H
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        response = tl.load(norm + row + c, mask=c < H, other=0.0)
        total += response
        factor = tl.load(gamma + c, mask=c < H, other=0.0)
        dot += tl.load(products + row + c, mask=c < H, other=0.0) * factor * response
    mean = tl.sum(total, 0) / H + GRN_EPS
    of_mean = tl.sum(dot, 0) / (H * mean * mean)
    for start in range(0, H, BLOCK):
        c = start + tl.arange(0, BLOCK)
        response = tl.load(norm + row + c, mask=c < H, other=0.0)
        factor = tl.load(gamma + c, mask=c < H, other=0.0)
        product = tl.load(products + row + c, mask=c < H, other=0.0)
        tl.store(scale + row + c, 1 + factor * response / mean, mask=c < H)
        tl.store(grad_gamma + row + c, product * response / mean, mask=c < H)
        # the norm's gradient at zero is taken as zero
        grad_norm = tl.where(response == 0, 0.0, product * factor / mean - of_mean)
        tl.store(pull + row + c, grad_norm / tl.where(response == 0, 1.0, response), mask=c < H)


@tuned(TILES, key=["H"], overwritten=("grad", "x"))
@triton.jit(do_not_specialize=["magnitude"])
def unscale_kernel(
    grad,
    x,
    bias,
    scale,
    pull,
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
    drawn = tl.load(pull + row, mask=c < H, other=0.0)[None, :]
    level = _shift(beta, c, c < H)
    total = tl.zeros([R, BLOCK_H], tl.float32)
    for start in range(tl.load(offsets + b) + j * R, last, programs * R):
        n = start + tl.arange(0, R)
        inside = (n < last)[:, None] & (c < H)[None, :]
        at = n.to(tl.int64)[:, None] * H + c[None, :]
        h, slope = _gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(inside, (g * factor + h * drawn) * slope, 0.0)
        total += g
        tl.store(grad_x + at, g, mask=inside)
        tl.store(out + at, h * factor + level, mask=inside)
    tl.store(partial + (b.to(tl.int64) * programs + j) * H + c, tl.sum(total, 0), mask=c < H)
