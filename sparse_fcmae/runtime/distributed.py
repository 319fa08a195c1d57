"""One process or many: what `torchrun` sets up."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_fcmae.runtime.device import choose_device
from sparse_fcmae.runtime.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` ones, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of the ranks, on all of them."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        dist.barrier()  # gloo keeps what it gathered until the next collective, and may abort a process ending before
        return values

    def main_first(self, do: Callable[[], None]) -> None:
        """Has the main rank do something. A UserError there is raised on all ranks, so that none waits for it."""
        problem = None
        if self.main:
            try:
                do()
            except UserError as error:
                problem = str(error)
        if problem := next(filter(None, self.gather(problem)), None):
            raise UserError(problem)

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


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins the process group when `torchrun` started this process (NCCL on GPUs, gloo elsewhere), and leaves it.

    device: a `device` option. Raises UserError where it can't be used.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    joining = world > 1 and not dist.is_initialized()
    if joining:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, chosen)
    finally:
        if joining:
            dist.destroy_process_group()


def averaging(objective: nn.Module, ranks: Ranks) -> nn.Module:
    """A module whose gradients are averaged over the ranks; in a run of one process it is the objective itself."""
    if ranks.world == 1:
        return objective
    device = ranks.device
    return DistributedDataParallel(objective, device_ids=[device.index] if device.type == "cuda" else None)
