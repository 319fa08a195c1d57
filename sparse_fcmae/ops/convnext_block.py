"""A whole ConvNeXt V2 block over visible patches, a few images at a time, as a `torch.library` op with autograd.

Between its layers a block holds several times its input, most of it 4 C channels wide. To a CPU, memory of that size is
far slower than its caches, and at the first use zeroed by the operating system. So there both passes take the images in
chunks whose wide features fit in the caches, all chunks through the same scratch memory, and the backward pass computes
again what was not kept. An image that is larger, or a batch that GRN pools over as a whole, is one chunk. A GPU takes
the whole batch at once, and the host never waits for it: nothing here reads there what a tensor holds.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.ops.block_dwconv import TAPS, check_dwconv, row_of, taps_of, weight_gradient_of
from sparse_fcmae.ops.gelu_grn import check_offsets

CHUNK_BYTES = 4 << 20  # of wide features; with fewer the matrix products get too small to be efficient
SCRATCH_BYTES = 64 << 20  # of each piece of scratch memory that is held on to: a single image may need more
KEEP_CHANNELS = 96  # from this width on a CPU reading pwconv1's output again is faster than computing it again


def convnext_block(x: Tensor, parameters: list[Tensor], slot: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """x + pwconv2(GRN(GELU(pwconv1(LN(dwconv7x7(x)))))), submanifold (ConvNeXt V2, sections 3.1 and 3.2).

    x: [T, S, S, C] float32 or bfloat16, on a GPU also float16, S one of 8, 4, 2, 1. parameters: the block's ten in the
    official order and shapes: weight and bias of dwconv, norm and pwconv1, gamma and beta of GRN, weight and bias of
    pwconv2.
    slot, index, offsets: as in `masking.VisiblePatches`; GRN pools over the patches offsets[b] to offsets[b + 1].

    Returns [T, S, S, C] of x's dtype. The matrix products are in autocast's dtype or else in pwconv1's, one of those
    too; sums are float32. Kept for the backward pass are x, the response norm and, on a GPU or from KEEP_CHANNELS on,
    pwconv1's output. Differentiable once in x and parameters. Raises ValueError for other shapes, dtypes or devices;
    that slot, index and offsets are of one mask is not checked on a GPU, as it would have to be waited for.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameters[4].dtype
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    keep = differentiated and (not kernels.of(x.device).ON_HOST or x.shape[-1] >= KEEP_CHANNELS)
    return _convnext_block(x, parameters, slot, index, offsets, dtype, keep)[0]


@torch.library.custom_op("sparse_fcmae::convnext_block", mutates_args=())
def _convnext_block(
    x: Tensor, parameters: list[Tensor], slot: Tensor, index: Tensor, offsets: Tensor, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; the response norm, float32 [B, 4 C]; pwconv1's output, less its bias, if `keep`, else no rows."""
    _check(x, parameters, slot, index, offsets, dtype)
    x, w, chunks = x.contiguous(), _Weights.of(parameters, dtype), _chunks(x, offsets, parameters[4].shape[0], dtype)
    ours, out = kernels.of(x.device), torch.empty_like(x)
    response = x.new_empty(len(offsets) - 1, w.wide, dtype=torch.float32)
    inner = x.new_empty(x.numel() // w.channels if keep else 0, w.wide, dtype=dtype)
    for chunk in chunks:
        features, first = x[chunk.patches], chunk.patches.start
        y = _scratch("y", chunk.size, w.channels, dtype, x.device)
        hidden = _scratch("hidden", chunk.size, w.wide, dtype, x.device)
        kept = inner[chunk.rows] if keep else hidden
        ours.block_dwconv(features, w.taps, w.dwconv_bias, slot, index, y, first=first, norm=w.norm)
        torch.mm(y, w.weight1.t(), out=kept)
        response_norm = response[chunk.images]
        ours.gelu_grn(kept, w.gamma, chunk.offsets, hidden, response_norm, bias=w.bias1, beta=w.beta)
        torch.addmm(w.bias2, hidden, w.weight2.t(), out=y)
        torch.add(features, y.view(features.shape), out=out[chunk.patches])
    return out, response, inner


@_convnext_block.register_fake
def _(x, parameters, slot, index, offsets, dtype, keep):
    wide = parameters[4].shape[0]
    response = x.new_empty(offsets.shape[0] - 1, wide, dtype=torch.float32)
    inner = x.new_empty(x.shape[0] * x.shape[1] * x.shape[2] if keep else 0, wide, dtype=dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), response, inner


@torch.library.custom_op("sparse_fcmae::convnext_block_backward", mutates_args=())
def _convnext_block_backward(
    grad: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    slot: Tensor,
    index: Tensor,
    offsets: Tensor,
    dtype: torch.dtype,
    response: Tensor,
    inner: Tensor,
    frozen: bool,
) -> list[Tensor]:
    """Gradients of x and, unless they are `frozen`, of the parameters."""
    x, w, chunks = x.contiguous(), _Weights.of(parameters, dtype), _chunks(x, offsets, parameters[4].shape[0], dtype)
    grad, grad_x, reversed_taps = grad.contiguous(), torch.empty_like(x), w.taps.flip(0)
    ours = kernels.of(x.device)
    taps_sums, norm_sums = (ours.zero_sums(n, w.channels, like=x) for n in (TAPS + 1, 2))
    grad_bias1, grad_gamma, grad_beta = wide_sums = tuple(torch.zeros_like(w.gamma) for _ in range(3))
    grad_bias2 = torch.zeros_like(w.dwconv_bias)
    grad_weight1 = grad_weight2 = None
    for chunk in chunks:
        n, features, first = chunk.size, x[chunk.patches], chunk.patches.start
        grad_out, y = grad[chunk.patches], _scratch("y", n, w.channels, dtype, x.device)
        hidden, grad_hidden = (_scratch(name, n, w.wide, dtype, x.device) for name in ("hidden", "grad_hidden"))
        slope = _scratch("slope", n, w.wide, dtype, x.device) if ours.ON_HOST else hidden  # Triton needs none
        z = _scratch("z", n, w.channels, torch.float32, x.device).view(features.shape)
        ours.block_dwconv(features, w.taps, w.dwconv_bias, slot, index, y, first=first, norm=w.norm, convolved=z)
        kept = inner[chunk.rows] if len(inner) else torch.mm(y, w.weight1.t(), out=slope)
        g = _cast("g", grad_out.view(n, w.channels), dtype)
        grad_bias2 += grad_out.sum((0, 1, 2), dtype=torch.float32)
        torch.mm(g, w.weight2, out=grad_hidden)
        pooled = (w.gamma, chunk.offsets, response[chunk.images])
        shifts = {"bias": w.bias1, "beta": w.beta}
        ours.gelu_grn_backward(grad_hidden, kept, *pooled, grad_hidden, wide_sums, out=hidden, slope=slope, **shifts)
        if not frozen:
            grad_weight2 = _add_product(grad_weight2, g, hidden)
            grad_weight1 = _add_product(grad_weight1, grad_hidden, y)
        torch.mm(grad_hidden, w.weight1, out=y)
        ours.layer_norm_backward(z, y, w.norm[0], z, norm_sums)
        if not frozen:
            ours.block_dwconv_weight(features, z, slot, index, taps_sums, first=first)
        grad_features = grad_x[chunk.patches]
        ours.block_dwconv(z, reversed_taps, None, slot, index, grad_features, first=first, residual=grad_out)
    if frozen:
        return [grad_x]
    taps, norm = taps_sums.sum(0), norm_sums.sum(0)
    grads = (
        *(weight_gradient_of(taps, parameters[0]), taps[TAPS], *norm),
        *(grad_weight1, grad_bias1, grad_gamma, grad_beta, grad_weight2, grad_bias2),
    )
    return [grad_x, *(_as_gradient(g, p) for g, p in zip(grads, parameters, strict=True))]


@_convnext_block_backward.register_fake
def _(grad, x, parameters, slot, index, offsets, dtype, response, inner, frozen):
    like = (x,) if frozen else (x, *parameters)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


def _setup_context(ctx, inputs, output):
    x, parameters, slot, index, offsets, ctx.dtype, _ = inputs
    ctx.save_for_backward(x, slot, index, offsets, *output[1:], *parameters)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    x, slot, index, offsets, response, inner, *parameters = ctx.saved_tensors
    grad_x, grads = None, [None] * len(parameters)
    if grad is not None:
        frozen = not any(ctx.needs_input_grad[1])
        features = (grad, x, parameters, slot, index, offsets)
        grad_x, *computed = _convnext_block_backward(*features, ctx.dtype, response, inner, frozen)
        grads = computed or grads
    return grad_x, grads, None, None, None, None, None


_convnext_block.register_autograd(_backward, setup_context=_setup_context)


class _Weights(NamedTuple):
    """A block's parameters as the kernels read them: float32, but pwconv's in the dtype of the matrix products."""

    taps: Tensor
    dwconv_bias: Tensor
    norm: tuple[Tensor, Tensor]
    weight1: Tensor
    bias1: Tensor
    gamma: Tensor
    beta: Tensor
    weight2: Tensor
    bias2: Tensor

    @classmethod
    def of(cls, parameters: list[Tensor], dtype: torch.dtype) -> "_Weights":
        dwconv_weight, dwconv_bias, norm_weight, norm_bias, weight1, bias1, gamma, beta, weight2, bias2 = parameters
        norm = (row_of(norm_weight), row_of(norm_bias))
        first, second = (_cast(name, weight, dtype) for name, weight in (("weight1", weight1), ("weight2", weight2)))
        bias1, gamma, beta = (row_of(p.flatten()) for p in (bias1, gamma, beta))
        return cls(
            taps_of(dwconv_weight), row_of(dwconv_bias), norm, first, bias1, gamma, beta, second, bias2.to(dtype)
        )

    @property
    def channels(self) -> int:
        return self.weight1.shape[1]

    @property
    def wide(self) -> int:
        return self.weight1.shape[0]


def _cast(name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`: itself, or else in the scratch memory of that name."""
    return matrix if matrix.dtype == dtype else _scratch(name, *matrix.shape, dtype, matrix.device).copy_(matrix)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a^T b, float32; the product itself has the dtype of a and b."""
    if total is not None and a.dtype == total.dtype:
        return total.addmm_(a.t(), b)
    shape = (a.shape[1], b.shape[1])
    product = a.new_empty(shape) if a.dtype == torch.float32 else _scratch("product", *shape, a.dtype, a.device)
    torch.mm(a.t(), b, out=product)  # not out of place: that would heed autocast
    return product.float() if total is None else total.add_(product)


def _as_gradient(total: Tensor | None, parameter: Tensor) -> Tensor:
    if total is None:
        return torch.zeros_like(parameter)
    total = total if total._base is None else total.clone(memory_format=torch.contiguous_format)
    return total.to(parameter.dtype).view(parameter.shape)


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_memory = _Memory()


def _scratch(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on the CPU, where fresh memory costs more than its use, this thread's later calls get it
    again."""
    size = rows * columns * dtype.itemsize
    if size > SCRATCH_BYTES or not kernels.of(device).ON_HOST:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    if name not in _memory.buffers or _memory.buffers[name].numel() < size:
        with torch.inference_mode(False):
            _memory.buffers[name] = torch.empty(size, dtype=torch.uint8)
    return _memory.buffers[name][:size].view(dtype).view(rows, columns)


class _Chunk(NamedTuple):
    """Successive images: their numbers, their patches and positions in the batch, and their offsets in positions."""

    images: slice
    patches: slice
    rows: slice
    offsets: Tensor

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


def _chunks(x: Tensor, offsets: Tensor, wide: int, dtype: torch.dtype) -> list[_Chunk]:
    """The batch in chunks of as many images as CHUNK_BYTES hold the wide features of, one at least; on a GPU in one."""
    area, images = x.shape[1] * x.shape[2], len(offsets) - 1
    if not kernels.of(x.device).ON_HOST:
        return [_Chunk(slice(0, images), slice(0, len(x)), slice(0, len(x) * area), offsets * area)]
    limit = CHUNK_BYTES // (max(1, wide) * dtype.itemsize * area)  # patches
    ends, positions, chunks, begin = offsets.tolist(), offsets * area, [], 0
    while begin < images:
        end = begin + 1
        while end < images and ends[end + 1] - ends[begin] <= limit:
            end += 1
        first, last = ends[begin], ends[end]
        rows = slice(first * area, last * area)
        chunks.append(_Chunk(slice(begin, end), slice(first, last), rows, positions[begin : end + 1]))
        begin = end
    return chunks


def _check(
    x: Tensor, parameters: list[Tensor], slot: Tensor, index: Tensor, offsets: Tensor, dtype: torch.dtype
) -> None:
    dwconv_weight, dwconv_bias, norm_weight, norm_bias, *rest = parameters
    check_offsets(x, offsets)
    check_dwconv(x, dwconv_weight, dwconv_bias, slot, index, norm_weight, norm_bias, offsets)
    kernels.check_dtype("convnext_block", x.device, dtype)
    channels, wide = x.shape[3], len(rest[0])
    if any(p.device != x.device for p in parameters):
        raise ValueError(f"all parameters must be on {x.device}")
    for name, p, shape in zip(
        ("pwconv1_weight", "pwconv1_bias", "gamma", "beta", "pwconv2_weight", "pwconv2_bias"),
        rest,
        ((wide, channels), (wide,), (wide,), (wide,), (channels, wide), (channels,)),
        strict=True,
    ):
        if (p.flatten() if name in ("gamma", "beta") else p).shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(p.shape)}")
