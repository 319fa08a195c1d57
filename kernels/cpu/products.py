"""Matrix products of features, each by whichever of PyTorch's own ways is the fastest for its shape on this machine.

"mm" is torch.mm, by the BLAS that torch was built with. "onednn" is a convolution with windows of one position, by
oneDNN, which has kernels for CPUs for which that BLAS takes slower ones. The environment variable
SPARSE_FCMAE_PRODUCTS names one of them for all products; else `runtime.choices` has what was measured.

The functions write to `out` or to memory of their own, and return where. They do not heed autocast.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_fcmae.kernels.cpu.scratch import buffer
from sparse_fcmae.runtime.choices import choose
from sparse_fcmae.runtime.errors import UserError

WAYS = ("mm", "onednn")
VARIABLE = "SPARSE_FCMAE_PRODUCTS"
ONCE, NOTHING = (1, 1), (0, 0)  # strides and dilations, paddings


def linear(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: [M, K], [N, K] and [N] -> [M, N]."""
    return _run("linear", _linear, x, weight, out, bias)


def linear_input_gradient(grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """The gradient of `linear`'s x: grad weight, [M, N] and [N, K] -> [M, K]."""
    return _run("input gradient", _input_gradient, grad, weight, out)


def add_weight_gradient(total: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """total + the gradient of `linear`'s weight, grad^T x: [M, N] and [M, K] -> float32 [N, K], in total if given.

    The product itself has the dtype of grad and x.
    """
    return _run("weight gradient", _add_weight_gradient, grad, x, total)


def _run(kind: str, product: Callable[..., Tensor], a: Tensor, b: Tensor, *others: Tensor | None) -> Tensor:
    way = os.environ.get(VARIABLE)
    if way not in (None, *WAYS):
        raise UserError(f"{VARIABLE} is {way}: choose one of {', '.join(WAYS)}")
    if not len(a):  # which oneDNN refuses
        way = "mm"
    elif way is None:
        rows = 1 << (len(a) - 1).bit_length()  # rounded up, so that there are few to measure
        inputs, outputs = (b.shape[1], a.shape[1]) if product is _add_weight_gradient else b.shape[::-1]
        what = f"{kind} {rows}x{inputs}x{outputs} {str(a.dtype).removeprefix('torch.')}"
        way = choose(what, lambda: _timed(product, a, b, others))
    return product(way, a, b, *others)


def _timed(
    product: Callable[..., Tensor], a: Tensor, b: Tensor, others: tuple[Tensor | None, ...]
) -> dict[str, Callable[[], Tensor]]:
    """The ways to compute a product, which leave what is given to it as it is."""
    given = [None if t is None else torch.zeros_like(t) for t in others]
    return {way: lambda way=way: product(way, a, b, *given) for way in WAYS}


def _linear(way: str, x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    if way == "onednn":
        result = torch.ops.aten.mkldnn_convolution(_image(x), weight[:, :, None, None], bias, NOTHING, ONCE, ONCE, 1)
        return _rows(result)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _input_gradient(way: str, grad: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    if way == "onednn":  # of the input it is the shape that counts
        return _rows(_convolution_backward(grad, out, weight, (True, False, False))[0])
    return torch.mm(grad, weight, out=out)


def _add_weight_gradient(way: str, grad: Tensor, x: Tensor, total: Tensor | None) -> Tensor:
    shape = (grad.shape[1], x.shape[1])
    if way == "onednn":
        weight = grad.new_empty(()).expand(shape)
        product = _convolution_backward(grad, x, weight, (False, True, False))[1].view(shape)
    elif total is not None and grad.dtype == total.dtype:
        return total.addmm_(grad.t(), x)
    else:
        product = grad.new_empty(shape) if grad.dtype == torch.float32 else buffer("product", *shape, grad.dtype)
        torch.mm(grad.t(), x, out=product)
    return product.float() if total is None else total.add_(product)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        _image(grad), _image(x), weight[:, :, None, None], None, ONCE, NOTHING, ONCE, False, NOTHING, 1, wanted
    )


def _image(rows: Tensor) -> Tensor:
    """Rows of channels as one image of a single column, channels last in memory: [M, C] -> [1, C, M, 1]."""
    return rows.view(1, len(rows), 1, rows.shape[1]).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """The inverse of `_image`."""
    return image.permute(0, 2, 3, 1).reshape(image.shape[2], image.shape[1])
