"""What the benchmarks share: masks, errors, memory kept, and times taken in turn."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.masking import kept_patches, random_mask

FILLED_BYTES = 1 << 30  # a third of a millisecond on a GPU of 2023, whose caches have 50 MB


def draw_mask(batch: int, grid: tuple[int, int], ratio: float) -> Tensor:
    """A random mask bool [batch, rows, cols], or for a ratio of 0 one that hides nothing."""
    return random_mask(batch, grid, ratio) if ratio else torch.zeros(batch, *grid, dtype=torch.bool)


def kept_of(grid: tuple[int, int], ratio: float) -> int:
    """How many patches of each image `draw_mask` keeps."""
    return kept_patches(grid, ratio) if ratio else grid[0] * grid[1]


def relative(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius error of a against b."""
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def kept_megabytes(forward: Callable[[], Tensor]) -> float:
    """What autograd keeps of a forward pass for the backward pass, each storage once, parameters included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # holds all that is kept until it is counted
    del result
    return sum(storages.values()) / 1e6


def take_turns(candidates: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every candidate in each of `rounds`, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            seconds = _seconds_on_gpu(run, device) if device.type == "cuda" else _seconds(run)
            if turn:
                times[name].append(seconds)
    return times


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_gpu(run: Callable[[], Any], device: torch.device) -> float:
    """Filling memory first empties the caches, and lets the host be ahead of the device where it is faster."""
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(FILLED_BYTES, dtype=torch.uint8, device=device).zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
