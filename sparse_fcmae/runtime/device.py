"""The device to compute on, and the CPU cores there are."""

import os
import re
import shutil
import sys

import torch

from sparse_fcmae.runtime.errors import UserError

MOST_CORES = 16
SHARED_MEMORY = "/dev/shm"  # on Linux
PEAKS = {  # of GPUs by a part of their name, in FLOP/s, of matrix products in bfloat16 without sparsity
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
BATCHES_IN_FLIGHT = 3  # of each loader process: two it has loaded ahead, and one that is being used


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a `device` option, made the current one. Raises UserError where it can't be used."""
    try:
        device = default_device() if name == "auto" else torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device).item()  # "meta" has no values
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        others = "auto or cpu" if name.startswith("cuda") else "auto, cpu or cuda"
        raise UserError(f"`device` {name} can't be used, choose {others}: {str(error).splitlines()[0]}") from None
    return device


def peak_flops(device: torch.device) -> float | None:
    """What a GPU's matrix products reach in bfloat16 at best, in FLOP/s, as its maker says; None where not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_memory(device: torch.device) -> float:
    """Bytes that this process has had in use at most: of a GPU by tensors, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores_per_process() -> int:
    """The CPU cores there are for each of the processes that `torchrun` started on this machine, 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_CORES, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def loader_processes(device: torch.device, asked: int | None, batch_bytes: int) -> tuple[int, list[str]]:
    """How many processes load images: as many as asked for, else one a core beside a GPU.

    Where the CPU computes too, one for every four cores leaves the cores to it. They pass batches of `batch_bytes` on
    in shared memory, of which containers have little. Where it is too small for as many, there are fewer, or none,
    which the lines returned say. Raises UserError where it is too small for those asked for.
    """
    wanted = (cores_per_process() // 4 or 1) if device.type == "cpu" else cores_per_process()
    wanted = wanted if asked is None else asked
    free, each = _free_shared_memory(), BATCHES_IN_FLIGHT * batch_bytes
    if free is None or wanted * each <= free:
        return wanted, []
    fitting = int(free // each)
    text = (
        f"{SHARED_MEMORY} has {free / 1e6:.0f} MB left, of which {_processes(wanted)} would take "
        f"{wanted * each / 1e6:.0f}: make it larger (docker run --shm-size=1g), or the batches smaller"
    )
    if asked is not None:
        raise UserError(f"{text}, or give `num_workers={fitting}`")
    return fitting, [f"{text}; until then {_processes(fitting)}"]


def _processes(count: int) -> str:
    return f"{count or 'no'} loader process{'es' if count > 1 else ''}"


def _free_shared_memory() -> int | None:
    """Bytes that this process may take of the memory that processes share, None where there is no limit."""
    if not os.path.isdir(SHARED_MEMORY):
        return None
    return shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
