"""What a training step of the encoder costs as one thing varies, beside what it would cost if it scaled ideally.

Ideally the time grows as the multiply-accumulates of the visible positions and shrinks as the threads are more, from
the first value on. Everything takes turns, so that a drift of the machine's speed does not look like a trend.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.plots import draw_scaling, require_matplotlib, save_png
from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.benchmarks.steps import Case, Run, builds
from sparse_fcmae.benchmarks.throughput import BASELINE, CROWDED, MAX_BATCH, after_one_run, check_usable, gated, ratio
from sparse_fcmae.benchmarks.timing import OUT_OF_MEMORY, failing_beyond_memory, take_turns, within_memory
from sparse_fcmae.config import ScalingConfig, image_size_of, listed, shown_size
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.errors import UserError
from sparse_fcmae.flops import count
from sparse_fcmae.training.distributed import choose_device

GATE_BATCH = 2
USUAL = {  # what --over varies: its usual values, and how each is read
    "mask-ratio": ("0,0.2,0.4,0.6,0.75,0.9,0.95", float),
    "image-size": ("224,384,512,768,1024", image_size_of),
    "batch-size": ("1,2,4,8,16,32,64", int),
    "threads": ("1,2,4,8,16", int),
    "model": ("atto,femto,pico,nano,tiny", str),
}
COLUMNS: Columns = {
    "over": ("over", ""),
    "value": ("value", ">"),
    "candidate": ("backend", ""),
    "ms": ("ms", ".1f"),
    "images_per_second": ("images/s", ".1f"),
    "speedup": (f"over {BASELINE}", ".2f"),
    "ideal_ms": ("ideal ms", ".1f"),
    "of_ideal": ("ideal / ms", ".2f"),
}


@failing_beyond_memory()
def scaling(**options: Any) -> list[Row]:
    """Prints and returns a row for each value and backend; options are those of `ScalingConfig`.

    of_ideal is the ideal time over the measured one: more than 1 is better than from the first value on.
    """
    config = ScalingConfig(**options)
    device = choose_device(config.device)
    results = Results("scaling", config, COLUMNS, device)
    values = values_of(config, device)
    names = list(BACKENDS) if config.backend == "all" else listed("backend", config.backend, str, BACKENDS)
    listed("model", config.model, str, SIZES)
    size = image_size_of(config.image_size)
    base = Case(config.model, size, config.mask_ratio, config.batch_size, config.dtype == "bf16", device)
    cases = {value: vary(base, config.over, value) for value in values}
    for case in cases.values():
        _ = case.kept  # refuses ratios and sizes that do not fit together
    check_usable(names, {base.dtype}, device)
    if config.png:
        require_matplotlib()
    torch.manual_seed(config.seed)
    results.add(measure(config, cases, names))
    if config.png:
        save_png(draw_scaling(results.rows), Path(config.png))
    return results.finish()


def values_of(config: ScalingConfig, device: torch.device) -> list[Any]:
    """The values to measure at. Raises UserError for those that can't be."""
    usual, kind = USUAL[config.over]
    name, known = ("model", SIZES) if config.over == "model" else ("values", None)
    values = listed(name, config.values or usual, kind, known)
    if config.over == "threads":
        if device.type != "cpu":
            raise UserError("--over threads is about the CPU: give --device cpu")
        if not config.values:
            values = [n for n in values if n <= torch.get_num_threads()]
        if max(values) > (os.cpu_count() or 1):
            raise UserError(f"--values: this machine runs {os.cpu_count()} threads at most")
    if config.over in ("threads", "batch-size") and not 1 <= min(values) <= max(values) <= MAX_BATCH:
        raise UserError(f"--values must be from 1 to {MAX_BATCH}")
    return values


def vary(case: Case, over: str, value: Any) -> Case:
    """The case at a value."""
    field = {"mask-ratio": "mask_ratio", "image-size": "size", "batch-size": "batch", "model": "model_name"}.get(over)
    return replace(case, **{field: value}) if field else case


def measure(config: ScalingConfig, cases: dict[Any, Case], names: list[str]) -> list[Row]:
    """The rows, those of one value together."""
    setting = {k: getattr(config, k) for k in ("model", "batch_size", "image_size", "mask_ratio", "dtype")}
    rows: dict[tuple[Any, str], Row] = {}
    runs: dict[tuple[Any, str], Run] = {}
    for value, case in cases.items():
        shown = shown_size(value) if config.over == "image-size" else value
        place = setting | {"over": config.over, "value": shown, config.over.replace("-", "_"): shown}
        refused = gated(replace(case, batch=min(case.batch, GATE_BATCH)), "step", names)[1]
        for name in names:
            reason = {"refused": refused[name]} if name in refused else {}
            rows[value, name] = place | {"candidate": name} | reason
        for name, build in builds(case, "step", [name for name in names if name not in refused]).items():
            if name not in names:
                continue
            run = within_memory(partial(after_one_run, build))
            if run is None:
                rows[value, name]["refused"] = OUT_OF_MEMORY
            else:
                runs[value, name] = with_threads(run, value) if config.over == "threads" else run
    device = next(iter(cases.values())).device
    times = within_memory(partial(take_turns, runs, config.rounds, device, ready=True))
    for key in runs if times is None else ():
        rows[key]["refused"] = CROWDED
    for (value, name), seconds in (times or {}).items():
        typical, row = statistics.median(seconds), rows[value, name]
        row |= {"ms": 1e3 * typical, "images_per_second": cases[value].batch / typical}
        row["speedup"] = ratio(times, (value, BASELINE), (value, name))
        first = next(v for v in cases if (v, name) in times)
        if name != BASELINE:
            share = work(config.over, cases[value], value) / work(config.over, cases[first], first)
            row["ideal_ms"] = 1e3 * statistics.median(times[first, name]) * share
            row["of_ideal"] = share * ratio(times, (first, name), (value, name))
    return list(rows.values())


def work(over: str, case: Case, value: Any) -> float:
    """What the time would be proportional to, ideally."""
    macs = case.batch * count(case.model_name, image_size=case.size, mask_ratio=case.mask_ratio)["encoder"].sparse
    return macs / value if over == "threads" else macs


def with_threads(run: Callable[[], Any], threads: int) -> Run:
    """A run on so many threads."""

    def limited() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run()
        finally:
            torch.set_num_threads(before)

    return limited
