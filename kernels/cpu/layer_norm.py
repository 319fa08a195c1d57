"""LayerNorm over the channels on the CPU: layer_norm.cpp."""

from torch import Tensor

from sparse_fcmae.kernels.cpu.library import INT, LONG, POINTER, TENSOR, Kernel, bf16

SIZE = (LONG, INT, LONG, INT)  # patches, side, channels, tile
_forward = Kernel("layer_norm", TENSOR, POINTER, POINTER, SIZE, TENSOR)
_backward = Kernel("layer_norm_backward", TENSOR, TENSOR, POINTER, SIZE, POINTER, POINTER)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, tile: int = 1) -> Tensor:
    """Writes to `out` [T, S / tile, S / tile, tile * tile * C] and returns it.

    x [T, S, S, C] and out are float32 or bfloat16, each by itself; weight and bias [C] are float32.
    """
    patches, side, _, channels = x.shape
    _forward(x, bf16(x), weight, bias, patches, side, channels, tile, out, bf16(out))
    return out


def layer_norm_backward(
    x: Tensor, grad: Tensor, weight: Tensor, grad_x: Tensor, sums: Tensor, *, tile: int = 1
) -> Tensor:
    """Writes to `grad_x`, which may be x, and returns it; adds the parameters' gradients to sums [threads, 2, C]."""
    patches, side, _, channels = x.shape
    _backward(x, bf16(x), grad, bf16(grad), weight, patches, side, channels, tile, grad_x, sums)
    return grad_x
