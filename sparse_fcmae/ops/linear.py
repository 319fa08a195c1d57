"""A linear layer on a CPU, by the fastest of PyTorch's own ways, as a `torch.library` op."""

from types import ModuleType

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.ops.checks import check_differentiation, differentiable_once
from sparse_fcmae.ops.context import product_dtype
from sparse_fcmae.ops.flops import counted, flops_of_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear` computes it: [..., K] -> [..., N].

    x: float32 or bfloat16 on a CPU; on GPUs one way is the fastest, so they have no kernel for this. weight: [N, K].
    bias: [N]. The result, and the products, have autocast's dtype, or without autocast that of all three. x in that
    dtype is kept for the backward pass. Differentiable once. Raises ValueError for other shapes or dtypes.
    """
    check_differentiation("linear")
    return _linear(x.to(product_dtype(weight)), weight, bias)


@torch.library.custom_op("sparse_fcmae::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kernels.check_dtype("linear", x.device, x.dtype)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)} are not for x {list(x.shape)}")
    out = x.new_empty(x[..., 0].numel(), len(weight))
    rows, matrix = x.reshape(len(out), x.shape[-1]).contiguous(), weight.to(x.dtype).contiguous()
    return _products(x).linear(rows, matrix, out, bias.to(x.dtype)).view(*x.shape[:-1], len(weight))


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("sparse_fcmae::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> list[Tensor]:
    """The gradients of x, and of weight and bias, each without elements unless it is wanted."""
    rows = x.reshape(x[..., 0].numel(), x.shape[-1]).contiguous()
    grad = grad.reshape(len(rows), len(weight)).contiguous()
    grad_x, grad_weight, grad_bias = grad.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if wanted[0]:
        out = torch.empty_like(rows)
        grad_x = _products(x).linear_input_gradient(grad, weight.to(x.dtype).contiguous(), out).view(x.shape)
    if wanted[1]:
        grad_weight = _products(x).add_weight_gradient(None, grad, rows).to(weight.dtype)
        grad_bias = grad.sum(0, dtype=torch.float32).to(weight.dtype)
    return [grad_x, grad_weight, grad_bias]


@_linear_backward.register_fake
def _(grad, x, weight, wanted):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    made = zip((x, weight, weight), shapes, (wanted[0], wanted[1], wanted[1]), strict=True)
    return [like.new_empty(shape if is_wanted else 0) for like, shape, is_wanted in made]


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    wanted = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])]
    grad_x, grad_weight, grad_bias = _linear_backward(grad, *ctx.saved_tensors, wanted)
    return (grad_x if wanted[0] else None), *((grad_weight, grad_bias) if wanted[1] else (None, None))


_linear.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(_linear_backward)
counted("linear", lambda x, weight, bias: flops_of_linear(x, weight))
counted("linear_backward", lambda grad, x, weight, wanted: sum(wanted) * flops_of_linear(x, weight))


def _products(x: Tensor) -> ModuleType:
    return kernels.load("products", x.device)
