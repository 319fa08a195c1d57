"""The device to compute on, and the CPU cores there are."""

import os

import torch

from sparse_fcmae.runtime.errors import UserError

MOST_CORES = 16


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


def cores_per_process() -> int:
    """The CPU cores there are for each of the processes that `torchrun` started on this machine, 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_CORES, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def loader_processes(device: torch.device, asked: int | None) -> int:
    """How many processes load images: as many as asked for, else one a core beside a GPU.

    Where the CPU computes too, one for every four cores leaves the cores to it.
    """
    if asked is not None:
        return asked
    return max(1, cores_per_process() // 4) if device.type == "cpu" else cores_per_process()
