"""What a training step of the encoder costs as one thing varies, beside what it would cost if it scaled ideally.

Ideally the time grows as the multiply-accumulates of the visible positions and shrinks as the threads are more, from
the first value on. Everything takes turns, so that a drift of the machine's speed does not look like a trend.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_fcmae.benchmarks.config import ScalingConfig
from sparse_fcmae.benchmarks.engine import Candidate, benchmark, take_turns
from sparse_fcmae.benchmarks.gates import BASELINE, check_backends, choose_backends
from sparse_fcmae.benchmarks.plots import draw_scaling, require_matplotlib, save_png
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import Case, run_of
from sparse_fcmae.benchmarks.throughput import MAX_BATCH
from sparse_fcmae.model.flops import count
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of, listed

GATE_BATCH = 2
USUAL = {  # what `over` varies: its usual values, and how each is read
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


@benchmark("scaling", ScalingConfig, COLUMNS)
def scaling(config: ScalingConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns a row for each value and backend.

    of_ideal is the ideal time over the measured one: more than 1 is better than from the first value on.
    """
    base, field = Case.of(config, device), config.over.replace("-", "_")
    cases = {value: replace(base, **{field: value}) for value in values_of(config, device)}
    names = choose_backends(config.backend, device, {base.dtype})
    if config.png:
        require_matplotlib()
    turns = take_turns(candidates(config.over, cases, names), config.rounds, device)

    def figures(key: tuple[Any, str]) -> Row:
        value, name = key
        row = {"speedup": turns.ratio((value, BASELINE), key)}
        if name != BASELINE:
            first = next(v for v in cases if (v, name) in turns.seconds)
            ideal = macs(cases[value]) / macs(cases[first])  # for an image
            more = cases[value].batch_size / cases[first].batch_size
            row["ideal_ms"] = turns.speed((first, name))["ms"] * ideal * more
            row["of_ideal"] = ideal * turns.ratio((first, name), key)
        return row

    yield (rows := turns.table(figures))
    if config.png and (figure := draw_scaling(rows)):
        save_png(figure, Path(config.png))


def values_of(config: ScalingConfig, device: torch.device) -> list[Any]:
    """The values to measure at. Raises UserError for those that can't be."""
    usual, kind = USUAL[config.over]
    values = listed("values", config.values or usual, kind)
    if config.over == "threads":
        if device.type != "cpu":
            raise UserError("`over=threads` is about the CPU: give `device=cpu`")
        if not config.values:
            values = [n for n in values if n <= torch.get_num_threads()]
        if max(values) > (os.cpu_count() or 1):
            raise UserError(f"`values` {config.values}: this machine runs {os.cpu_count()} threads at most")
    if config.over in ("threads", "batch-size") and not 1 <= min(values) <= max(values) <= MAX_BATCH:
        raise UserError(f"`values` must be from 1 to {MAX_BATCH}")
    return values


def candidates(over: str, cases: dict[Any, Case], names: list[str]) -> Iterator[Candidate]:
    """Every backend at every value."""
    for value, case in cases.items():
        place = case.setting | {"over": over, "value": case.setting[over.replace("-", "_")]}
        checked = check_backends(replace(case, batch_size=min(case.batch_size, GATE_BATCH)), "step", names)
        for name in names:
            refused = {key: reason for key, reason in checked[name].items() if key == "refused"}
            row = place | {"candidate": name} | refused
            yield Candidate((value, name), partial(run_of, case, "step", name), row, case.batch_size)


def macs(case: Case) -> float:
    """What the time of an image would be proportional to, ideally: multiply-accumulates of a thread."""
    cost = count(case.model, image_size=case.image_size, mask_ratio=case.mask_ratio)["encoder"].sparse
    return cost / (case.threads or 1)
