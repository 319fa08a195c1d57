"""Where the time of a training step of the `native` encoder goes on the CPU: self times, and bytes moved if known."""

from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from sparse_fcmae.benchmarks.config import ProfileConfig
from sparse_fcmae.benchmarks.engine import benchmark
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import Case, builds, setting_of
from sparse_fcmae.kernels.observe import observing

PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}  # which of their inputs are multiplied
SHOWN = 16
COLUMNS: Columns = {
    "what": ("what", ""),
    "calls": ("calls", ".0f"),
    "ms": ("ms", ".1f"),
    "share": ("share", ".1%"),
    "mb": ("MB moved", ".0f"),
}


@benchmark("profile", ProfileConfig, COLUMNS)
def profile_step(config: ProfileConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns what takes the most time, in milliseconds of a step, and all of it together."""
    case = Case.of(config, device)
    step = builds(case, "step", ["native"])["native"]()
    moved: Counter[str] = Counter()

    def labelled(run: Callable[..., Any], kernel: str, *arguments: Any) -> Any:
        label = f"kernel {kernel}"
        moved[label] += sum(a.nbytes for a in arguments if isinstance(a, Tensor))
        with record_function(label):
            return run(kernel, *arguments)

    step()
    with observing(labelled), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        for _ in range(config.rounds):
            step()
    calls, spent = Counter(), Counter()
    for event in trace.key_averages(group_by_input_shape=True):
        name = "matrix products" if event.key in PRODUCTS else event.key
        calls[name] += event.count
        spent[name] += event.self_cpu_time_total / 1e3
        if event.key in PRODUCTS:
            first, second = (event.input_shapes[i] for i in PRODUCTS[event.key])
            numbers = prod(first) + prod(second) + first[0] * second[1]
            moved[name] += case.dtype.itemsize * numbers * event.count
    total, setting = sum(spent.values()), setting_of(config)
    rows = [
        setting
        | {
            "what": name,
            "calls": calls[name] / config.rounds,
            "ms": ms / config.rounds,
            "bytes": moved[name] / config.rounds,
            "mb": moved[name] / config.rounds / 1e6 or None,
            "share": ms / total,
        }
        for name, ms in spent.most_common(SHOWN)
    ]
    yield [*rows, setting | {"what": "all", "ms": total / config.rounds}]
