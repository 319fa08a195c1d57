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
from sparse_fcmae.benchmarks.steps import Case, run_of
from sparse_fcmae.kernels.observe import observing

# matrix products, in both ways of `kernels.cpu.products`: how many numbers they move, of the shapes of their inputs
PRODUCTS: dict[str, Callable[[list[list[int]]], int]] = {
    "aten::mm": lambda shapes: prod(shapes[0]) + prod(shapes[1]) + shapes[0][0] * shapes[1][1],
    "aten::addmm": lambda shapes: prod(shapes[1]) + prod(shapes[2]) + shapes[1][0] * shapes[2][1],
    "aten::addmm_": lambda shapes: prod(shapes[1]) + prod(shapes[2]) + shapes[1][0] * shapes[2][1],
    "aten::mkldnn_convolution": lambda shapes: prod(shapes[0]) + prod(shapes[1]) + shapes[0][2] * shapes[1][0],
    "aten::convolution_backward": lambda shapes: sum(map(prod, shapes[:3])),
}
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
    step = run_of(case, "step", "native")
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
            moved[name] += case.dtype.itemsize * PRODUCTS[event.key](event.input_shapes) * event.count
    total, rows = sum(spent.values()), []
    for name, ms in spent.most_common(SHOWN):
        moved_bytes = moved[name] / config.rounds
        row = {"what": name, "calls": calls[name] / config.rounds, "ms": ms / config.rounds, "share": ms / total}
        rows.append(case.setting | row | {"bytes": moved_bytes, "mb": moved_bytes / 1e6 or None})
    yield [*rows, case.setting | {"what": "all", "ms": total / config.rounds}]
