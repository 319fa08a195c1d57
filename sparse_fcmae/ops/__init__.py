"""Ops: what of the encoder is not a library call. Importing this registers them with `torch.library`."""

from sparse_fcmae.ops.block_dwconv import block_dwconv
from sparse_fcmae.ops.convnext_block import convnext_block
from sparse_fcmae.ops.gelu_grn import gelu_grn
from sparse_fcmae.ops.layer_norm import layer_norm

__all__ = ["block_dwconv", "convnext_block", "gelu_grn", "layer_norm"]
