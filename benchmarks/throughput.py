"""Backend against backend: the encoder's forward pass, that and its backward pass, whole pretraining steps.

All run on the same images, masks and weights, taking turns, so that the ratios hold on a noisy machine although the
times do not. A backend has to compute what `masked` does, and compiled or in a CUDA graph what it does plainly.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from sparse_fcmae.benchmarks.config import ThroughputConfig
from sparse_fcmae.benchmarks.engine import CROWDED, Candidate, Gate, Run, Turns, benchmark, take_turns
from sparse_fcmae.benchmarks.gates import (
    BASELINE,
    another_function,
    check_backends,
    choose_backends,
    same_as,
    same_training,
)
from sparse_fcmae.benchmarks.memory import OUT_OF_MEMORY, kept_megabytes, peak_megabytes, within_memory
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import (
    LIMITS,
    ONCE,
    WORKS,
    Case,
    computed,
    limits_of,
    listed_cases,
    run_of,
    variants_of,
)
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import listed

GATE_BATCH = 8
PEERS = {  # that can't be measured, and why
    "spconv": "has no depthwise convolution: its groups must be 1",
    "WarpConvNet": "runs on CUDA devices alone, and there is no backend of it here",
}
MAX_BATCH = 1 << 14  # where the search for the largest one ends
COLUMNS: Columns = {
    "model": ("model", ""),
    "image_size": ("pixels", ">"),
    "mask_ratio": ("masked", "g"),
    "dtype": ("dtype", ""),
    "batch_size": ("batch", "d"),
    "work": ("work", ""),
    "candidate": ("backend", ""),
    "p20_ms": ("p20", ".1f"),
    "ms": ("p50 ms", ".1f"),
    "p80_ms": ("p80", ".1f"),
    "images_per_second": ("images/s", ".1f"),
    "speedup": (f"over {BASELINE}", ".2f"),
    "over_minkowski": ("over minkowski", ".2f"),
    "over_limit": ("times the products", ".2f"),
    "difference": ("result differs by", ".0e"),
    "peak_mb": ("peak MB", ".0f"),
    "kept_mb": ("kept MB", ".0f"),
    "forward_error": ("error of result", ".0e"),
    "gradient_error": ("of gradients", ".0e"),
}


@benchmark("throughput", ThroughputConfig, COLUMNS)
def throughput(config: ThroughputConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns a row for each backend, kind of work and setting.

    ms and quantiles are of one step; speedup and over_limit are medians over the rounds of the ratio of images/s to
    that of `masked`, and of that of the visible positions' matrix products alone, by the faster way, to it.
    """
    works = listed("work", config.work, str, WORKS)
    dtypes = listed("dtype", config.dtype, str, ("fp32", "bf16"))
    batches = listed("batch_size", config.batch_size, lambda text: text if text == "max" else int(text))
    if any(batch != "max" and not 1 <= batch <= MAX_BATCH for batch in batches):
        raise UserError(f"`batch_size` must be from 1 to {MAX_BATCH}, or max, not {config.batch_size}")
    cases = [Case(*case, GATE_BATCH, dtype == "bf16", device) for case in listed_cases(config) for dtype in dtypes]
    if "pretrain" in works and not all(case.mask_ratio for case in cases):
        raise UserError("pretraining needs masks: give a `mask_ratio` greater than 0, or `work=forward,step`")
    names = choose_backends(config.backend, device, {case.dtype for case in cases})
    for case in cases:
        checked = {kind: check_backends(case, kind, names) for kind in dict.fromkeys(map(WORKS.get, works))}
        reasons = {name: row["refused"] for rows in checked.values() for name, row in rows.items() if "refused" in row}
        setting = {key: value for key, value in case.setting.items() if key != "batch_size"}  # which is the gate's
        yield [setting | {"candidate": name, "refused": reason} for name, reason in reasons.items()]
        exact = [name for name in names if name not in reasons]
        for batch, work in product(batches if exact else [], works):
            errors = checked[WORKS[work]]
            yield [row | errors.get(row["candidate"], {}) for row in rows_at(batch, case, work, exact, config)]
    if config.backend == "all":
        yield absent_peers()


def absent_peers() -> list[Row]:
    """Rows for what can't be measured, with the reason."""
    there = {name: "" if importlib.util.find_spec(name.lower()) else "not installed, and " for name in PEERS}
    return [{"candidate": name, "refused": there[name] + reason} for name, reason in PEERS.items()]


def rows_at(batch: int | str, case: Case, work: str, backends: list[str], config: ThroughputConfig) -> list[Row]:
    """A row for each candidate at a batch size, or each at its largest one."""
    batches = {name: largest_batch(case, work, name) if batch == "max" else batch for name in backends}
    while True:
        turns = take_turns(candidates(batches, case, work, config, batch != "max"), config.rounds, case.device)
        crowded = any(row.get("refused") == CROWDED for row in turns.rows.values())
        if batch != "max" or not crowded or max(batches.values()) == 1:
            return turns.table(partial(figures, turns))
        batches = {name: size // 2 or size for name, size in batches.items()}  # what fits alone may not beside others


def candidates(
    batches: dict[str, int], case: Case, work: str, config: ThroughputConfig, variants: bool
) -> Iterator[Candidate]:
    """Backends at a batch size each, the matrix products alone, and the backends' variants if wanted.

    At the largest batches they are not, as a graph's own memory would leave too little to the others.
    """
    torch.compiler.reset()  # or else the second batch size would be compiled for any
    cases = {size: replace(case, batch_size=size) for size in batches.values()}
    for backend, size in sorted(batches.items(), key=lambda item: item[1]):
        sized = cases[size]
        row = sized.setting | {"work": work, "candidate": backend} | ({} if size else {"refused": OUT_OF_MEMORY})
        build, gate = partial(run_of, sized, work, backend), partial(memory_of, work, case.device)
        yield Candidate(backend, build, row, size, gate)
        for variant in variants_of(sized, work, backend, config.compiled) if variants else ():
            row, build = row | {"candidate": f"{backend}, {variant}"}, partial(run_of, sized, work, backend, variant)
            yield Candidate(row["candidate"], build, row, size, gate_of(variant, work, backend, case, config.seed))
    if least := min(filter(None, cases), default=0):
        for name, build in limits_of(cases[least], work).items():
            yield Candidate(name, build, cases[least].setting | {"work": work, "candidate": name}, least)


def gate_of(variant: str, work: str, backend: str, case: Case, seed: int) -> Gate:
    """The gate of a backend's variant. One that is known to compute something else has its error shown."""
    if variant == ONCE:
        return another_function(backend)
    return same_training(seed) if work == "pretrain" else same_as(backend, case)


def memory_of(work: str, device: torch.device, run: Run, passed: Mapping[Any, Run]) -> Row:
    """The gate of a backend that has passed the others: what a run takes, and what its forward pass keeps."""
    run()  # what the first one alone takes does not count
    peak = within_memory(partial(peak_megabytes, run, device))
    kept = within_memory(partial(kept_megabytes, partial(computed, *run.args))) if work == "step" else None
    return {"peak_mb": peak, "kept_mb": kept}


def figures(turns: Turns, name: str) -> Row:
    """What follows from the times of a candidate."""
    if name in LIMITS:
        return turns.spread(name)
    return turns.spread(name) | {
        "speedup": turns.ratio(BASELINE, name),
        "over_minkowski": turns.ratio("minkowski", name),
        "over_limit": turns.ratio(name, *LIMITS),
    }


def largest_batch(case: Case, work: str, backend: str) -> int:
    """The largest power of two of images of which twice as many fit into memory, up to MAX_BATCH; 0 if one does not.

    What is left is for the candidates that it takes turns with.
    """
    batch = 1
    while batch <= MAX_BATCH:
        trial = Candidate(backend, partial(run_of, replace(case, batch_size=batch), work, backend))
        if not take_turns([trial], 0, case.device).seconds:
            return batch // 4 or batch // 2
        batch *= 2
    return MAX_BATCH
