"""The Triton kernels as functions on contiguous GPU tensors.

Each file has an op's kernels and the functions that launch them. `patch_to_row` and `row_to_patch` are those of
`backends.patch_map.PatchMap`. Features hold whole images, whose first patch has number `first` in the batch. Sums over
all positions are added to sums that start from `zero_sums`, in an order that is the same for the same shapes and tiles.
No function waits for the device.
"""

import torch
from torch import Tensor

from sparse_fcmae.kernels.triton import tuning  # refuses a Triton that is too old

__all__ = ["CAPABILITY", "DTYPES", "tuning", "unusable", "zero_sums"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of features
CAPABILITY = (8, 0)  # the least compute capability of a CUDA device


def unusable(device: torch.device) -> str | None:
    """Why the kernels can't run on a device, in one line; None where they can."""
    if device.type not in ("cuda", "xpu"):
        return f"there are no native kernels for {device.type}"
    if not torch.get_device_module(device).is_available():
        return f"there is no {device.type} device"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the Triton kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None


def zero_sums(*shape: int, like: Tensor) -> Tensor:
    """Zeros float32 [1, ...], on the device of `like`."""
    return like.new_zeros(1, *shape, dtype=torch.float32)
