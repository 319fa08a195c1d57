"""Where the time of a training step of the `native` encoder goes on the CPU: self times, and bytes moved if known."""

from collections import Counter
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.benchmarks.timing import draw_mask
from sparse_fcmae.config import ProfileConfig, image_size_of
from sparse_fcmae.encoder import SparseEncoder
from sparse_fcmae.kernels import cpu

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
SHOWN = 16
COLUMNS: Columns = {
    "what": ("what", ""),
    "calls": ("calls", ".0f"),
    "ms": ("ms", ".1f"),
    "share": ("share", ".1%"),
    "mb": ("MB moved", ".0f"),
}


def profile_step(**options: Any) -> list[Row]:
    """Prints and returns what takes the most time, milliseconds of a step; options are those of `ProfileConfig`."""
    config = ProfileConfig(**options)
    results = Results("profile", config, COLUMNS, torch.device("cpu"))
    torch.manual_seed(config.seed)
    size = image_size_of(config.image_size)
    encoder = SparseEncoder(config.model, image_size=size, backend="native")
    images = torch.randn(config.batch_size, 3, *size)
    mask = draw_mask(config.batch_size, encoder.grid(*size), config.mask_ratio)

    def step() -> None:
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bf16"):
            features = encoder(images, mask)
        features.float().square().mean().backward()

    kernel_bytes: Counter[str] = Counter()
    call = cpu.call

    def labelled(name: str, *arguments: Tensor | int | None) -> int | None:
        label = f"kernel {name}"
        kernel_bytes[label] += sum(a.nbytes for a in arguments if isinstance(a, Tensor))
        with record_function(label):
            return call(name, *arguments)

    step()
    with patch.object(cpu, "call", labelled), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        for _ in range(config.rounds):
            step()
    width = 2 if config.dtype == "bf16" else 4
    spent: dict[str, dict[str, float]] = {}
    for event in trace.key_averages(group_by_input_shape=True):
        matrix = event.key in MATRIX_PRODUCTS
        name = "matrix products" if matrix else event.key
        row = spent.setdefault(name, {"calls": 0, "ms": 0, "bytes": 0})
        row["calls"] += event.count / config.rounds
        row["ms"] += event.self_cpu_time_total / 1e3 / config.rounds
        if matrix:
            first, second = event.input_shapes[:2] if event.key == "aten::mm" else event.input_shapes[1:3]
            row["bytes"] += width * (prod(first) + prod(second) + first[0] * second[1]) * event.count / config.rounds
    for name, size in kernel_bytes.items():
        spent[name]["bytes"] = size / config.rounds
    total = sum(row["ms"] for row in spent.values())
    rows = [
        {"what": name, **row, "mb": row["bytes"] / 1e6 or None, "share": row["ms"] / total}
        for name, row in spent.items()
    ]
    rows.sort(key=lambda row: -row["ms"])
    setting = {k: getattr(config, k) for k in ("model", "batch_size", "image_size", "mask_ratio", "dtype")}
    rows.append({"what": "all", "ms": total})
    results.add([setting | row for row in rows[:SHOWN] + rows[-1:]])
    return results.finish()
