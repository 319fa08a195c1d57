"""Each Triton kernel that a pretraining step launches, alone and with cold caches.

Its bytes are those of the tensors that it is given, of images too whose patches it reads in part. Its rate is compared
with that of a large copy in the same run.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_fcmae.benchmarks.engine import Candidate, Run, attempt, take_turns
from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.benchmarks.steps import Case, run_of
from sparse_fcmae.kernels.constants import TAPS
from sparse_fcmae.kernels.observe import observing


class Launch(NamedTuple):
    """A kind of launch: a kernel, its shape, and which of its tensors are left out.

    again: launches the kernel with such arguments. templates: the arguments, floating tensors without their values.
    bytes: of the tensors. flops: operations, 0 where they do not count.
    """

    again: Callable[..., None]
    templates: list[Any]
    bytes: int
    flops: int

    def build(self, device: torch.device) -> Run:
        """A launch with random numbers in floating tensors."""
        arguments = [
            torch.rand(a.shape, dtype=a.dtype, device=device) if isinstance(a, Tensor) and a.is_meta else a
            for a in self.templates
        ]
        return partial(self.again, *arguments)


def time_kernels(case: Case, rounds: int, copied: float, flops: float) -> Iterator[Row]:
    """A row for each Triton kernel and shape that a pretraining step launches.

    copied, flops: bytes that a large copy moves, and operations of a large product, in a second.
    """
    seen: dict[str, Launch] = {}
    calls: Counter[str] = Counter()

    def observe(run: Callable[..., None], kernel: Any, grid: Any, *arguments: Any, **sizes: Any) -> None:
        run(kernel, grid, *arguments, **sizes)
        name = getattr(kernel, "base_fn", kernel.fn).__name__.removesuffix("_kernel")
        shown = {key: value for key, value in sizes.items() if not (key.startswith("BLOCK") or value is False)}
        shape = " ".join(key if value is True else f"{key}={value}" for key, value in shown.items())
        missing = [n for n, a in zip(kernel.arg_names, arguments, strict=False) if a is None]
        kind = f"{name} {shape}" + (f" without {' '.join(missing)}" if missing else "")
        if kind not in seen:
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            templates = [a.to("meta") if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
            work = 2 * TAPS * tensors[0].numel() if name.startswith("block_dwconv") else 0
            seen[kind] = Launch(partial(run, kernel, grid, **sizes), templates, sum(t.nbytes for t in tensors), work)
        calls[kind] += 1

    def observed_step() -> Row:
        step = run_of(case, "pretrain", "native")
        step()  # times tiles too
        with observing(observe):
            step()
        return {}

    if refusal := attempt(observed_step):
        yield {"kernel": "all"} | refusal
        return
    for kind, launch in seen.items():  # one at a time, as all their tensors together would not fit
        candidate = Candidate(kind, partial(launch.build, case.device), {"kernel": kind, "calls": calls[kind]})
        turns = take_turns([candidate], rounds, case.device)
        row = turns.rows[kind]
        if kind in turns.seconds:
            row["ms"] = turns.speed(kind)["ms"]
            moved, done = (1e3 * work / row["ms"] for work in (launch.bytes, launch.flops))
            row |= {"gb_per_second": moved / 1e9, "of_copy": moved / copied}
            row |= {"tflop_per_second": done / 1e12, "of_product": done / flops} if done else {}
        yield row
