"""What a run takes of a device's memory, and the lack of it."""

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OUT_OF_MEMORY = "out of memory"
NO_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|could not create a memory", re.I)
SPARE = 0.95  # the fraction of the available memory that a benchmark may take


def within_memory(do: Callable[[], Any]) -> Any:
    """What `do` returns; None where it does not fit into the device's memory."""
    try:
        return do()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
    gc.collect()
    _trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


@contextmanager
def failing_beyond_memory() -> Iterator[None]:
    """Has Linux refuse memory that it does not have, instead of promising it and then killing the process."""
    try:
        import resource

        available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _status("VmData") + int(SPARE * _within_cgroup(available))
    except (ImportError, OSError, AttributeError):
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft < 0 else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def kept_megabytes(forward: Callable[[], Tensor]) -> float:
    """What autograd keeps of a forward pass for the backward pass, each storage once, parameters included.

    What an extension keeps outside autograd's hooks, as MinkowskiEngine does its convolutions' inputs, is not seen.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # holds all that is kept until it is counted
    del result
    return sum(storages.values()) / 1e6


def peak_megabytes(run: Callable[[], Any], device: torch.device) -> float | None:
    """The most that a run takes beside what was held: of PyTorch's memory on a GPU, else of Linux's resident memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        _trim()  # what is free in the heap would be taken without growing
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1e6
    except (OSError, AttributeError):
        return None


def _trim() -> None:
    """Has the C library give back what is free, where it can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes in a line of Linux's account of this process."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _within_cgroup(available: int) -> int:
    """How much of the available memory this process may use; a container may allow less than the machine has."""
    try:
        limit, used, stat = (Path(f"/sys/fs/cgroup/memory.{k}").read_text() for k in ("max", "current", "stat"))
        cached = int(re.search(r"^inactive_file (\d+)", stat, re.M)[1])  # given back where it is needed
        return min(available, int(limit) - int(used) + cached)
    except (OSError, ValueError, TypeError):  # there is no such group, or it may use all
        return available
