"""One process or many: what `torchrun` sets up."""

import atexit
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from sparse_fcmae.runtime.device import choose_device
from sparse_fcmae.runtime.errors import UserError

T = TypeVar("T")
FIRST = itertools.count()  # numbers what the main rank does before the others
PATIENCE = timedelta(days=7)
LEFT = "sparse_fcmae/left"  # the key under which ranks that have done their work are counted
LEAVING_SECONDS = 60  # that a rank waits for the others, one of which may have been killed


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world` ones, and its device.

    group: by which they exchange values, None for the one that all processes have in common.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def apart(self) -> "Ranks":
        """The same ranks with a group of their own on the CPU, by which threads may exchange values meanwhile."""
        return self if self.world == 1 else replace(self, group=dist.new_group(backend="gloo"))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of the ranks, on all of them."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, self.group)
        dist.barrier(
            self.group
        )  # gloo keeps what it gathered until the next collective, and may abort a process ending before
        return values

    def by_main(self, do: Callable[[], Any]) -> Any:
        """What the main rank alone does, and its picklable result on all ranks.

        A UserError there is raised on all ranks, so that none waits for it.
        """
        result, problem = None, None
        if self.main:
            try:
                result = do()
            except UserError as error:
                problem = str(error)
        result, problem = self.gather((result, problem))[0]
        if problem:
            raise UserError(problem)
        return result

    def on_main(self, do: Callable[[], T]) -> T | None:
        """What the main rank alone makes and keeps; None on the others. A UserError there is raised on all ranks."""
        made: list[T] = []
        self.by_main(lambda: made.append(do()))
        return made[0] if made else None

    def main_first(self, do: Callable[[], T]) -> T:
        """What all ranks do, the others after the main one, which keeps on the disk what they would find out again.

        Where the main rank raises an exception, the others raise a UserError of the same text.
        """
        if self.world == 1:
            return do()
        # not a collective, which ends after minutes, as this may take hours
        store, key, problem = dist.distributed_c10d._get_default_store(), f"sparse_fcmae/first/{next(FIRST)}", ""
        if not self.main:
            store.wait([key], PATIENCE)
            if problem := store.get(key).decode():
                raise UserError(problem)
            return do()
        try:
            return do()
        except BaseException as error:
            problem = str(error) or type(error).__name__
            raise
        finally:
            store.set(key, problem)

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
    """Joins the process group when `torchrun` started this process (gloo, and NCCL on GPUs), and leaves it.

    device: a `device` option. Raises UserError where it can't be used.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    joining = world > 1 and not dist.is_initialized()
    if joining:
        meeting = {"store": store, "rank": rank, "world_size": world} if (store := _store_of_attempt(world)) else {}
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE, **meeting)  # `training.watch` finds out who hangs
    try:
        yield Ranks(rank, world, chosen)
        if joining:
            _wait_for_the_last(world)
    finally:
        if joining:
            dist.destroy_process_group()


def _store_of_attempt(world: int) -> dist.Store | None:
    """Where the processes that torchrun has started again meet each other; None where PyTorch's own place will do.

    torchrun keeps one store for all attempts, in which processes would find the addresses of those that are gone, and
    wait for them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = new_store(world)
    store.set_timeout(PATIENCE)  # as PyTorch's own place has it
    return store


def new_store(world: int) -> dist.Store:
    """A further connection to the store that this attempt's processes meet by, which a thread may use by itself."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    return dist.PrefixStore(f"sparse_fcmae/attempt_{attempt}", store)


def _wait_for_the_last(world: int) -> None:
    """Waits until all ranks have done their last collective.

    A barrier is a collective itself, and one rank may be through it and close its connections while another still waits
    for its end, which gloo answers by aborting that process. So this counts the ranks in the store that they met by.
    """
    store, deadline = dist.distributed_c10d._get_default_store(), time.monotonic() + LEAVING_SECONDS
    with suppress(RuntimeError):  # the store may end with the rank that keeps it
        left = store.add(LEFT, 1)
        all_left = -(-left // world) * world  # a program may join and leave more than once
        while left < all_left and time.monotonic() < deadline:
            time.sleep(0.01)
            left = store.add(LEFT, 0)


def end_process(code: int) -> NoReturn:
    """Ends one process of many at once, after all that is due at exit, with an exit code.

    PyTorch keeps threads of a group over which gradients were averaged, even after the group was left. One that still
    runs while Python takes its interpreter apart can abort the process, and then a finished run counts as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
