"""Memory that calls use one after the other: fresh memory costs more than its use, as the system zeroes it first."""

import threading

import torch
from torch import Tensor

SCRATCH_BYTES = 64 << 20  # of each piece that is held on to: a single image may need more


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_memory = _Memory()


def buffer(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory [rows, columns], which this thread's later calls of that name get again."""
    size = rows * columns * dtype.itemsize
    if size > SCRATCH_BYTES:
        return torch.empty(rows, columns, dtype=dtype)
    if name not in _memory.buffers or _memory.buffers[name].numel() < size:
        with torch.inference_mode(False):
            _memory.buffers[name] = torch.empty(size, dtype=torch.uint8)
    return _memory.buffers[name][:size].view(dtype).view(rows, columns)


def cast(name: str, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`: itself, or else a copy in the scratch memory of that name."""
    return matrix if matrix.dtype == dtype else buffer(name, *matrix.shape, dtype).copy_(matrix)
