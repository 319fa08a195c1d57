"""Matrix products of a block's features and gradients."""

import torch
from torch import Tensor

from sparse_fcmae.kernels.cpu.scratch import buffer


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a^T b, float32; the product itself has the dtype of a and b."""
    if total is not None and a.dtype == total.dtype:
        return total.addmm_(a.t(), b)
    shape = (a.shape[1], b.shape[1])
    product = a.new_empty(shape) if a.dtype == torch.float32 else buffer("product", *shape, a.dtype)
    torch.mm(a.t(), b, out=product)  # not out of place, which would heed autocast
    return product.float() if total is None else total.add_(product)
