"""One process or many: what `torchrun` sets up, and the device to train on."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparse_fcmae.backends import default_device, resolve_backend
from sparse_fcmae.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world` ones; `device` is its own."""

    rank: int
    world: int
    device: torch.device
    joined: bool = False  # whether `start` made the process group

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on all ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, elementwise."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a --device flag means, made the current one. Raises UserError where it can't be used."""
    try:
        device = default_device() if name == "auto" else torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device).item()  # "meta" has no values
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from None
    return device


def choose_dtype(name: str, device: torch.device, backend: str) -> torch.dtype:
    """The autocast dtype of a --dtype flag: "auto" is bfloat16 where device and backend compute in it.

    Raises UserError where the backend can't be used with it.
    """
    if name == "auto" and resolve_backend(backend, device.type).unusable(device, torch.bfloat16):
        name = "fp32"
    elif name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif name == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        name = "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    resolve_backend(backend, device.type, dtype)
    return dtype


def cores_per_rank() -> int:
    """The CPU cores there are for each process on this machine, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def start(device: str) -> Ranks:
    """Joins the process group when started by `torchrun` (NCCL on GPUs, gloo elsewhere)."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    joining = world > 1 and not dist.is_initialized()
    if joining:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(rank, world, chosen, joining)


def stop(ranks: Ranks) -> None:
    """Leaves the process group that `start` made."""
    if ranks.joined:
        dist.destroy_process_group()
