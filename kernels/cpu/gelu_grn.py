"""GELU and global response normalisation on the CPU: gelu_grn.cpp."""

import torch
from torch import Tensor

from sparse_fcmae.kernels.cpu.library import LONG, POINTER, TENSOR, Kernel, bf16

_forward = Kernel("gelu_grn", TENSOR, *[POINTER] * 4, LONG, LONG, POINTER, POINTER)
_backward = Kernel("gelu_grn_backward", POINTER, TENSOR, *[POINTER] * 5, LONG, LONG, *[POINTER] * 6)


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

    x [N, H] is float32 or bfloat16; bias [H], which is added to x, gamma and beta [H] are float32. offsets int64
    [B + 1]: image b has the positions offsets[b] to offsets[b + 1].
    """
    _forward(x, bf16(x), bias, gamma, beta, offsets, len(offsets) - 1, x.shape[-1], out, norm)
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

    Adds the gradients of bias (the sum of grad_x over all positions), gamma and beta to sums, [H] each. scratch, shaped
    as x, is overwritten, and may be x itself; without it memory is taken for it.
    """
    scratch = torch.empty_like(x) if scratch is None else scratch
    images, channels = len(offsets) - 1, x.shape[-1]
    rows = (bias, gamma, beta, offsets, norm)
    _backward(grad, x, bf16(x), *rows, images, channels, grad_x, out, scratch, *sums)
    return grad_x
