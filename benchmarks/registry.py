"""The parts of the report: which benchmarks, in which cases, and how their rows are drawn.

A new benchmark is a file beside this one, with its cases, candidates, gates and columns. A line here and a heading in
`report.html` put it on the report's page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparse_fcmae.backends import BACKENDS, choose_dtype
from sparse_fcmae.benchmarks import plots
from sparse_fcmae.benchmarks.compare import compare
from sparse_fcmae.benchmarks.config import ReportConfig
from sparse_fcmae.benchmarks.data import data
from sparse_fcmae.benchmarks.gflops import gflops
from sparse_fcmae.benchmarks.kernels import kernels
from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.benchmarks.scaling import scaling
from sparse_fcmae.benchmarks.throughput import absent_peers, throughput

Options = dict[str, Any]
BATCHES = {"atto": 32, "femto": 32, "pico": 16, "nano": 16, "tiny": 8, "base": 4, "large": 2, "huge": 1}  # on a CPU
GPU_SCALE = 16  # times as many on a GPU
SLOW_BF16 = "this machine has no instructions for it, so that it is slower than fp32"


@dataclass(frozen=True)
class Plan:
    """What a report measures: its options, the models that they list, and the device."""

    config: ReportConfig
    models: list[str]
    device: torch.device

    def step_of(self, model: str, **others: Any) -> Options:
        """Options for a step of a model, with few enough images for a usual machine."""
        batch = BATCHES[model] * (GPU_SCALE if self.device.type == "cuda" else 1)
        common = {"rounds": self.config.rounds, "seed": self.config.seed, "device": self.config.device}
        return common | {"model": model, "batch_size": batch} | others

    def steps_over(self, what: str, batch_size: int) -> list[Options]:
        """Options for steps of the first model as something varies, in few rounds."""
        rounds = min(3, self.config.rounds)
        return [self.step_of(self.models[0], over=what, batch_size=batch_size, rounds=rounds)]

    @property
    def dtypes(self) -> str:
        """Those that the device has instructions for."""
        return "fp32,bf16" if choose_dtype("auto", self.device, "auto") == torch.bfloat16 else "fp32"


def not_measured(plan: Plan) -> list[Row]:
    """The peers that can't be measured, and bfloat16 where it is slow."""
    return absent_peers() + ([] if "bf16" in plan.dtypes else [{"dtype": "bf16", "refused": SLOW_BF16}])


@dataclass(frozen=True)
class Section:
    """A part of the page.

    benchmark: what measures its rows. runs: the options of each time that it runs. plots: name of the file -> what
    draws the rows. beside: further rows, which are not measured.
    """

    benchmark: Callable[..., list[Row]]
    runs: Callable[[Plan], list[Options]]
    plots: dict[str, Callable[[list[Row]], Any]]
    beside: Callable[[Plan], list[Row]] = lambda plan: []


SECTIONS = {
    "gflops": Section(gflops, lambda plan: [{}], {"gflops": plots.draw_gflops}),
    "throughput": Section(
        throughput,
        lambda plan: [plan.step_of(model, dtype=plan.dtypes, backend=",".join(BACKENDS)) for model in plan.models],
        {"throughput": plots.draw_speedups, "memory": plots.draw_memory},
        not_measured,
    ),
    "mask ratio": Section(
        scaling, lambda plan: plan.steps_over("mask-ratio", 8), {"scaling-mask-ratio": plots.draw_scaling}
    ),
    "image size": Section(
        scaling, lambda plan: plan.steps_over("image-size", 2), {"scaling-image-size": plots.draw_scaling}
    ),
    "compare": Section(compare, lambda plan: list(map(plan.step_of, plan.models)), {"compare": plots.draw_speeds}),
    "autoencoders": Section(
        compare, lambda plan: [plan.step_of("base", task="pretrain")], {"autoencoders": plots.draw_speeds}
    ),
    "kernels": Section(kernels, lambda plan: [plan.step_of(plan.models[0])], {"kernels": plots.draw_bounds}),
    "data": Section(
        data,
        lambda plan: [{"data": plan.config.data or "", "rounds": plan.config.rounds, "seed": plan.config.seed}],
        {"data": plots.draw_speeds},
    ),
}
