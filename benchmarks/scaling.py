"""What a training step of the encoder costs as one thing varies, beside what it would cost if it scaled ideally.

Ideally the time grows as the multiply-accumulates of the visible positions and shrinks as the threads are more, from
the first value on. Everything takes turns, so that a drift of the machine's speed does not look like a trend.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_fcmae.benchmarks.config import ScalingConfig
from sparse_fcmae.benchmarks.engine import Candidate, Run, benchmark, take_turns, torch_threads
from sparse_fcmae.benchmarks.gates import BASELINE, check_backends, choose_backends
from sparse_fcmae.benchmarks.plots import draw_scaling, require_matplotlib, save_png
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import Case, builds, setting_of
from sparse_fcmae.benchmarks.throughput import MAX_BATCH
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.model.flops import count
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of, listed, shown_size

GATE_BATCH = 2
USUAL = {  # what `over` varies: its usual values, and how each is read
    "mask-ratio": ("0,0.2,0.4,0.6,0.75,0.9,0.95", float),
    "image-size": ("224,384,512,768,1024", image_size_of),
    "batch-size": ("1,2,4,8,16,32,64", int),
    "threads": ("1,2,4,8,16", int),
    "model": ("atto,femto,pico,nano,tiny", str),
}
FIELDS = {"mask-ratio": "mask_ratio", "image-size": "size", "batch-size": "batch", "model": "model_name"}  # of a Case
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
    values = values_of(config, device)
    listed("model", config.model, str, SIZES)
    base = Case.of(config, device)
    vary = FIELDS.get(config.over)
    cases = {value: replace(base, **{vary: value}) if vary else base for value in values}
    for case in cases.values():
        _ = case.num_visible  # refuses ratios and sizes that do not fit together
    names = choose_backends(config.backend, device, {base.dtype})
    if config.png:
        require_matplotlib()
    turns = take_turns(candidates(config, cases, names), config.rounds, device)

    def figures(key: tuple[Any, str]) -> Row:
        value, name = key
        row = turns.speed(key) | {"speedup": turns.ratio((value, BASELINE), key)}
        if name != BASELINE:
            first = next(v for v in cases if (v, name) in turns.seconds)
            ideal = macs(config, cases[value], value) / macs(config, cases[first], first)  # for an image
            more = cases[value].batch / cases[first].batch
            row["ideal_ms"] = turns.speed((first, name))["ms"] * ideal * more
            row["of_ideal"] = ideal * turns.ratio((first, name), key)
        return row

    yield (rows := turns.table(figures))
    if config.png and (figure := draw_scaling(rows)):
        save_png(figure, Path(config.png))


def values_of(config: ScalingConfig, device: torch.device) -> list[Any]:
    """The values to measure at. Raises UserError for those that can't be."""
    usual, kind = USUAL[config.over]
    name, known = ("model", SIZES) if config.over == "model" else ("values", None)
    values = listed(name, config.values or usual, kind, known)
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


def candidates(config: ScalingConfig, cases: dict[Any, Case], names: list[str]) -> Iterator[Candidate]:
    """Every backend at every value."""
    for value, case in cases.items():
        shown = shown_size(value) if config.over == "image-size" else value
        place = setting_of(config) | {"over": config.over, "value": shown, config.over.replace("-", "_"): shown}
        _, refused = check_backends(replace(case, batch=min(case.batch, GATE_BATCH)), "step", names)
        built = builds(case, "step", [name for name in names if name not in refused])
        for name in names:
            row = place | {"candidate": name} | ({"refused": refused[name]} if name in refused else {})
            threads = value if config.over == "threads" else None
            yield Candidate((value, name), partial(by_threads, built.get(name), threads), row, case.batch)


def macs(config: ScalingConfig, case: Case, value: Any) -> float:
    """What the time of an image would be proportional to, ideally: multiply-accumulates of a thread."""
    cost = count(case.model_name, image_size=case.size, mask_ratio=case.mask_ratio)["encoder"].sparse
    return cost / value if config.over == "threads" else cost


def by_threads(build: Callable[[], Run], threads: int | None) -> Run:
    """What is built, run by so many threads; None for as many as there are anyway."""
    run = build()

    def limited() -> None:
        with torch_threads(threads):
            run()

    return limited
