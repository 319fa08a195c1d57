"""Each Triton kernel that a training step of the encoder launches, alone and with cold caches.

Its bytes are those of the tensors that it is given, its rate is compared with that of a large copy in the same run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.benchmarks.config import KernelsConfig
from sparse_fcmae.benchmarks.engine import Candidate, Run, Turns, ready, take_turns
from sparse_fcmae.benchmarks.gates import check_backends
from sparse_fcmae.benchmarks.memory import OUT_OF_MEMORY, within_memory
from sparse_fcmae.benchmarks.rates import measure_rates
from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.benchmarks.steps import Case, builds, setting_of
from sparse_fcmae.kernels.constants import TAPS
from sparse_fcmae.kernels.observe import observing
from sparse_fcmae.runtime.errors import UserError


def rows(config: KernelsConfig, case: Case) -> Iterator[Row]:
    """A row for each kernel and shape. Raises UserError where the kernels are wrong."""
    _, refused = check_backends(case, "step", ["native"])
    if refused:
        raise UserError(f"the kernels are not measured: {refused['native']}")
    rates = measure_rates(case.device, [torch.float32], config.rounds)
    copied, flops = rates["bytes"], rates[torch.float32]
    setting = setting_of(config) | {"measured_bytes_per_second": copied, "measured_flops_per_second": flops}
    for row in time_kernels(case, config.rounds, copied, flops):
        yield setting | row


@dataclass
class Launch:
    """A kind of launch: a kernel, its shape, and which of its tensors are left out.

    again: launches the kernel with such arguments. templates: the arguments, floating tensors without their values.
    bytes: of the tensors. flops: operations, 0 where they do not count. calls: of this kind in a step.
    """

    again: Callable[..., None]
    templates: list[Any]
    bytes: int
    flops: int
    calls: int = 0

    def build(self, device: torch.device) -> Run:
        """A launch with random numbers in floating tensors."""

        def filled(template: Any) -> Any:
            if isinstance(template, Tensor) and template.is_meta:
                return torch.rand(template.shape, dtype=template.dtype, device=device)
            return template

        return partial(self.again, *map(filled, self.templates))


def time_kernels(case: Case, rounds: int, copied: float, flops: float) -> Iterator[Row]:
    """A row for each Triton kernel and shape that a step of the encoder launches.

    copied, flops: bytes that a large copy moves, and operations of a large product, in a second.
    """
    seen: dict[str, Launch] = {}

    def observe(run: Callable[..., None], kernel: Any, grid: Any, *arguments: Any, **sizes: Any) -> None:
        run(kernel, grid, *arguments, **sizes)
        name = getattr(kernel, "base_fn", kernel.fn).__name__.removesuffix("_kernel")
        shape = " ".join(f"{key}={value}" for key, value in sizes.items() if key != "BLOCK_C")
        missing = [n for n, a in zip(kernel.arg_names, arguments, strict=False) if a is None]
        kind = f"{name} {shape}" + (f" without {' '.join(missing)}" if missing else "")
        if kind not in seen:
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            templates = [a.to("meta") if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
            work = 2 * TAPS * tensors[0].numel() if name.startswith("block_dwconv") else 0
            seen[kind] = Launch(partial(run, kernel, grid, **sizes), templates, sum(t.nbytes for t in tensors), work)
        seen[kind].calls += 1

    step = within_memory(partial(ready, builds(case, "step", ["native"])["native"]))  # which times tiles too
    if step is None:
        yield {"kernel": "all", "refused": OUT_OF_MEMORY}
        return
    with observing(observe):
        step()
    for kind, launch in seen.items():  # one at a time, as all their tensors together would not fit
        candidate = Candidate(kind, partial(launch.build, case.device), {"kernel": kind, "calls": launch.calls})
        turns = take_turns([candidate], rounds, case.device)

        def figures(kind: str, launch: Launch = launch, turns: Turns = turns) -> Row:
            seconds = turns.speed(kind)["ms"] / 1e3
            moved, done = launch.bytes / seconds, launch.flops / seconds
            row = {"ms": 1e3 * seconds, "gb_per_second": moved / 1e9, "of_copy": moved / copied}
            return row | ({"tflop_per_second": done / 1e12, "of_product": done / flops} if done else {})

        yield from turns.table(figures)
