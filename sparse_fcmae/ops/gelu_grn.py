"""GELU, global response normalisation and its scale in one: the kernels as a `torch.library` op."""

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.ops.block_dwconv import row_of


def gelu_grn(x: Tensor, gamma: Tensor, offsets: Tensor) -> Tensor:
    """h * (1 + gamma * N) with h = GELU(x), exact (erf), and N the response norm of each image (ConvNeXt V2, 3.2).

    N_c = G_c / (mean of G + 1e-6), G_c the norm of h_c over all positions of the image. Only x and G are kept for the
    backward pass, which computes GELU again. The beta of the full layer is left to the layer that follows.

    x: [T, S, S, H] float32 or bfloat16, on a GPU also float16. gamma: [H]. offsets: int64 [B + 1], image b owns patches
    offsets[b] to offsets[b + 1] of the T. Returns [T, S, S, H] of x's dtype; sums are float32. Differentiable once in x
    and gamma. Raises ValueError for other shapes, dtypes or devices.
    """
    return _gelu_grn(x, gamma, offsets)[0]


@torch.library.custom_op("sparse_fcmae::gelu_grn", mutates_args=())
def _gelu_grn(x: Tensor, gamma: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    check(x, gamma, offsets)
    x = x.contiguous()
    norm = x.new_empty(len(offsets) - 1, x.shape[-1], dtype=torch.float32)
    return kernels.of(x.device).gelu_grn(x, row_of(gamma), positions_of(x, offsets), torch.empty_like(x), norm), norm


@_gelu_grn.register_fake
def _(x, gamma, offsets):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, gamma.new_empty(offsets.shape[0] - 1, x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("sparse_fcmae::gelu_grn_backward", mutates_args=())
def _gelu_grn_backward(grad: Tensor, x: Tensor, gamma: Tensor, offsets: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    grad_x, out, slope = (torch.empty_like(x) for _ in range(3))
    sums = tuple(torch.zeros_like(gamma, dtype=torch.float32) for _ in range(3))
    offsets = positions_of(x, offsets)
    row = row_of(gamma)
    kernels.of(x.device).gelu_grn_backward(grad, x, row, offsets, norm, grad_x, sums, out=out, slope=slope)
    return grad_x, sums[1].to(gamma.dtype)


@_gelu_grn_backward.register_fake
def _(grad, x, gamma, offsets, norm):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(gamma)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return *_gelu_grn_backward(grad, *ctx.saved_tensors), None


_gelu_grn.register_autograd(_backward, setup_context=_setup_context)


def check(x: Tensor, gamma: Tensor, offsets: Tensor) -> None:
    """Raises ValueError where these are not `gelu_grn`'s arguments."""
    kernels.check_dtype("gelu_grn", x.device, x.dtype)
    if x.dim() != 4 or gamma.shape != x.shape[3:] or gamma.device != x.device:
        raise ValueError(f"x must be [T, S, S, H] and gamma [H], not {tuple(x.shape)} and {tuple(gamma.shape)}")
    check_offsets(x, offsets)


def check_offsets(x: Tensor, offsets: Tensor) -> None:
    """Raises ValueError where offsets do not divide the patches x; on a GPU their values are not looked at."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or not len(offsets) or offsets.device != x.device:
        raise ValueError(f"offsets must be int64 [B + 1] on {x.device}")
    if not kernels.of(x.device).ON_HOST:
        return
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != len(x) or ends != sorted(ends):
        raise ValueError(f"offsets must ascend from 0 to {len(x)}")


def positions_of(x: Tensor, offsets: Tensor) -> Tensor:
    """offsets, counted in positions instead of patches."""
    return offsets * (x.shape[1] * x.shape[2])
