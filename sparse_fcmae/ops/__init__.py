"""Ops: what of the network is not a library call. Importing this registers them with `torch.library`.

Each op has a file here, kernels of its name in `kernels/cpu` and `kernels/triton`, and a function in `reference` that
specifies it in plain PyTorch; `convnext_block` is specified by `model.convnext.Block`, whose parts are in `reference`.
An op knows no devices: `kernels.load` finds the kernels for a tensor's.
"""

from sparse_fcmae.ops.block_dwconv import block_dwconv
from sparse_fcmae.ops.convnext_block import convnext_block
from sparse_fcmae.ops.gelu_grn import gelu_grn
from sparse_fcmae.ops.layer_norm import layer_norm
from sparse_fcmae.ops.linear import linear
from sparse_fcmae.ops.patch_embed import patch_embed
from sparse_fcmae.ops.patch_errors import patch_errors

__all__ = ["block_dwconv", "convnext_block", "gelu_grn", "layer_norm", "linear", "patch_embed", "patch_errors"]
