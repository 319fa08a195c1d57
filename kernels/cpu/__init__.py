"""The C++ kernels as functions on contiguous CPU tensors.

What a kernel computes is said in the .cpp file of its name. `patch_to_row` and `row_to_patch` are those of
`backends.patch_map.PatchMap`. Features hold whole images, whose first patch has number `first` in the batch. Sums over
all positions are added to a row of their own for each thread ([threads, ...], see `zero_sums`), so that no two threads
write to the same place.
"""

import torch
from torch import Tensor

from sparse_fcmae.kernels.cpu import library
from sparse_fcmae.kernels.cpu.library import instruction_set

__all__ = ["DTYPES", "instruction_set", "unusable", "zero_sums"]

DTYPES = (torch.float32, torch.bfloat16)  # of features


def unusable(device: torch.device) -> str | None:
    """Why the kernels can't run on this CPU, in one line; None where they can."""
    return library.unusable()


def zero_sums(*shape: int, like: Tensor) -> Tensor:
    """Zeros float32 [threads, ...], on the device of `like`."""
    return like.new_zeros(torch.get_num_threads(), *shape, dtype=torch.float32)
