"""Ops: what of the encoder is not a library call. Importing this registers them with `torch.library`."""

from sparse_fcmae.ops.block_dwconv import block_dwconv
from sparse_fcmae.ops.gelu_grn import gelu_grn

__all__ = ["block_dwconv", "gelu_grn"]
