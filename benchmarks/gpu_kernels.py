"""Each Triton kernel that a training step of the encoder launches, alone and with cold caches.

Its bytes are those of the tensors that it is given, its rate is compared with that of a large copy in the same run.
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_fcmae import kernels
from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.benchmarks.steps import Case, builds
from sparse_fcmae.benchmarks.throughput import after_one_run, gated
from sparse_fcmae.benchmarks.timing import OUT_OF_MEMORY, take_turns, within_memory
from sparse_fcmae.config import KernelsConfig, image_size_of
from sparse_fcmae.errors import UserError
from sparse_fcmae.ops.block_dwconv import TAPS

COLUMNS: Columns = {
    "kernel": ("kernel", ""),
    "calls": ("calls", "d"),
    "ms": ("ms", ".3f"),
    "gb_per_second": ("GB/s", ".0f"),
    "of_copy": ("of a copy", ".2f"),
    "tflop_per_second": ("TFLOP/s", ".1f"),
    "of_product": ("of a float32 product", ".2f"),
}


def gpu_kernels(config: KernelsConfig, device: torch.device) -> list[Row]:
    """Prints and returns a row for each kernel and shape. Raises UserError where the kernels can't run or are wrong."""
    if reason := kernels.unusable(device):
        raise UserError(f"there are no kernels to measure: {reason}")
    torch.manual_seed(config.seed)
    size, bf16 = image_size_of(config.image_size), config.dtype == "bf16"
    case = Case(config.model, size, config.mask_ratio, config.batch_size, bf16, device)
    results = Results("kernels", config, COLUMNS, device)
    if reason := gated(case, "step", ["native"])[1].get("native"):
        raise UserError(f"the kernels are not measured: {reason}")
    setting = {k: getattr(config, k) for k in ("model", "batch_size", "image_size", "mask_ratio", "dtype")}
    copy, flops = measure_ceilings(device, config.rounds)
    setting |= {"measured_bytes_per_second": copy, "measured_flops_per_second": flops}
    results.add([setting | row for row in time_kernels(case, config.rounds, copy, flops)])
    return results.finish()


def time_kernels(case: Case, rounds: int, copy: float, flops: float) -> Iterator[Row]:
    """A row for each Triton kernel and shape that a step of the encoder launches.

    copy, flops: bytes and operations a second of `measure_ceilings`.
    """
    ours = kernels.of(case.device)
    launch, seen, calls = ours.launch, {}, Counter()

    def record(kernel: Any, grid: Any, *arguments: Any, **sizes: Any) -> None:
        launch(kernel, grid, *arguments, **sizes)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        name = getattr(kernel, "base_fn", kernel.fn).__name__.removesuffix("_kernel")
        shape = " ".join(f"{key}={value}" for key, value in sizes.items() if key != "BLOCK_C")
        missing = [n for n, a in zip(kernel.arg_names, arguments, strict=False) if a is None]
        key = f"{name} {shape}" + (f" without {' '.join(missing)}" if missing else "")
        calls[key] += 1
        work = 2 * TAPS * tensors[0].numel() if name.startswith("block_dwconv") else 0
        templates = [a.to("meta") if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        seen.setdefault(key, (kernel, grid, templates, sizes, sum(t.nbytes for t in tensors), work))

    step = within_memory(partial(after_one_run, builds(case, "step", ["native"])["native"]))  # which times tiles too
    if step is None:
        yield {"kernel": "all", "refused": OUT_OF_MEMORY}
        return
    with patch.object(ours, "launch", record):
        step()
    for key, (kernel, grid, templates, sizes, size, work) in seen.items():
        arguments = [
            torch.rand(a.shape, dtype=a.dtype, device=case.device) if isinstance(a, Tensor) and a.is_meta else a
            for a in templates
        ]
        run = partial(launch, kernel, grid, *arguments, **sizes)
        seconds = statistics.median(take_turns({key: run}, rounds, case.device)[key])
        row = {"kernel": key, "calls": calls[key], "ms": 1e3 * seconds}
        row |= {"gb_per_second": size / seconds / 1e9, "of_copy": size / seconds / copy}
        yield row | ({"tflop_per_second": work / seconds / 1e12, "of_product": work / seconds / flops} if work else {})


def measure_ceilings(device: torch.device, rounds: int) -> tuple[float, float]:
    """Bytes a second, read and written, of a large copy; operations a second of a large product in float32."""
    scale = 4 if device.type == "cuda" else 1
    source, target = torch.zeros(2, scale << 26, device=device).unbind()
    side = 2048 * scale
    square, out = torch.randn(2, side, side, device=device).unbind()
    runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(square, square, out=out)}
    best = {name: min(times) for name, times in take_turns(runs, rounds, device).items()}
    return 2 * source.nbytes / best["copy"], 2 * side**3 / best["product"]
