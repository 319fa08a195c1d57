"""Backend against backend: the encoder's forward pass, that and its backward pass, whole pretraining steps.

All run on the same images, masks and weights, taking turns, so that the ratios hold on a noisy machine although the
times do not. A backend has to compute what `masked` does, and compiled or in a CUDA graph what it does plainly.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from sparse_fcmae.benchmarks.config import ThroughputConfig
from sparse_fcmae.benchmarks.engine import CROWDED, Candidate, Run, Turns, benchmark, ready, take_turns
from sparse_fcmae.benchmarks.gates import BASELINE, check_backends, choose_backends, same_as
from sparse_fcmae.benchmarks.memory import OUT_OF_MEMORY, kept_megabytes, peak_megabytes, within_memory
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import WORKS, Case, builds, computed, matrix_products
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of, listed, shown_size

GATE_BATCH = 8
PEERS = {  # that can't be measured, and why
    "spconv": "has no depthwise convolution: its groups must be 1",
    "WarpConvNet": "runs on CUDA devices alone, and there is no backend of it here",
}
MAX_BATCH = 1 << 14  # where the search for the largest one ends
LIMIT = "matrix products"
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
    "peak_mb": ("peak MB", ".0f"),
    "kept_mb": ("kept MB", ".0f"),
    "forward_error": ("error of result", ".0e"),
    "gradient_error": ("of gradients", ".0e"),
}


@benchmark("throughput", ThroughputConfig, COLUMNS)
def throughput(config: ThroughputConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns a row for each backend, kind of work and setting.

    ms and quantiles are of one step; speedup and over_limit are medians over the rounds of the ratio of images/s to
    that of `masked`, and of that of the visible positions' matrix products alone to it.
    """
    works = listed("work", config.work, str, WORKS)
    models = listed("model", config.model, str, SIZES)
    sizes = listed("image_size", config.image_size, image_size_of)
    ratios = listed("mask_ratio", config.mask_ratio, float)
    dtypes = listed("dtype", config.dtype, str, ("fp32", "bf16"))
    batches = listed("batch_size", config.batch_size, lambda text: text if text == "max" else int(text))
    if any(batch != "max" and not 1 <= batch <= MAX_BATCH for batch in batches):
        raise UserError(f"`batch_size` must be from 1 to {MAX_BATCH}, or max, not {config.batch_size}")
    cases = [
        Case(model, size, ratio, GATE_BATCH, dtype == "bf16", device)
        for model, size, ratio, dtype in product(models, sizes, ratios, dtypes)
    ]
    for case in cases:
        if case.num_visible and not case.mask_ratio and "pretrain" in works:
            raise UserError("pretraining needs masks: give a `mask_ratio` greater than 0, or `work=forward,step`")
    names = choose_backends(config.backend, device, {case.dtype for case in cases})
    for case in cases:
        setting = {
            "model": case.model_name,
            "image_size": shown_size(case.size),
            "mask_ratio": case.mask_ratio,
            "dtype": "bf16" if case.bf16 else "fp32",
        }
        checked = {kind: check_backends(case, kind, names) for kind in dict.fromkeys(map(WORKS.get, works))}
        refused = {name: reason for _, reasons in checked.values() for name, reason in reasons.items()}
        yield [setting | {"candidate": name, "refused": reason} for name, reason in refused.items()]
        exact = [name for name in names if name not in refused]
        for batch, work in product(batches if exact else [], works):
            errors, _ = checked[WORKS[work]]
            rows = rows_at(batch, case, work, exact, config)
            yield [setting | row | errors.get(row["candidate"], {}) for row in rows]
    if config.backend == "all":
        yield absent_peers()


def absent_peers() -> list[Row]:
    """Rows for what can't be measured, with the reason."""
    there = {name: "" if importlib.util.find_spec(name.lower()) else "not installed, and " for name in PEERS}
    return [{"candidate": name, "refused": there[name] + reason} for name, reason in PEERS.items()]


def rows_at(batch: int | str, case: Case, work: str, backends: list[str], config: ThroughputConfig) -> list[Row]:
    """A row for each candidate at a batch size, or each at its largest one."""
    batches = {name: largest_batch(case, work, name) if batch == "max" else batch for name in backends}
    none = {"work": work, "batch_size": 0, "refused": OUT_OF_MEMORY}
    rows = [none | {"candidate": name} for name, size in batches.items() if not size]
    batches = {name: size for name, size in batches.items() if size}
    while batches:
        turns = take_turns(candidates(batches, case, work, config, batch != "max"), config.rounds, case.device)
        crowded = any(row.get("refused") == CROWDED for row in turns.rows.values())
        if batch != "max" or not crowded or max(batches.values()) == 1:
            return rows + turns.table(partial(figures, turns))
        batches = {
            name: max(1, size // 2) for name, size in batches.items()
        }  # what fits alone may not fit beside others
    return rows


def candidates(
    batches: dict[str, int], case: Case, work: str, config: ThroughputConfig, variants: bool
) -> list[Candidate]:
    """Backends at a batch size each, the matrix products alone, and the backends' variants if wanted.

    At the largest batches they are not, as a graph's own memory would leave too little to the others.
    """
    torch.compiler.reset()  # or else the second batch size would be compiled for any
    found = []
    for size in sorted(set(batches.values())):
        sized = replace(case, batch=size)
        together = [name for name in batches if batches[name] == size]
        for name, build in builds(sized, work, together, config.compiled).items():
            row = {"work": work, "batch_size": size, "candidate": name}
            if name in together:
                found.append(Candidate(name, build, row, size, figures=partial(memory_of, sized, work, name)))
            elif variants:
                gate = same_as(name.split(", ")[0], case, work, config.seed)
                found.append(Candidate(name, build, row, size, gate=gate))
    least = min(batches.values())
    row = {"work": work, "batch_size": least, "candidate": LIMIT}
    products = partial(matrix_products, replace(case, batch=least), work)
    return [*found, Candidate(LIMIT, products, row, least)]


def memory_of(case: Case, work: str, backend: str, run: Run) -> Row:
    """What a run of a backend takes, and what its forward pass keeps for the backward pass."""

    def kept() -> float:
        encoder, inputs = case.model("step").with_backend(backend), case.inputs()
        return kept_megabytes(lambda: computed(encoder, *inputs, case))

    peak = within_memory(partial(peak_megabytes, run, case.device))
    return {"peak_mb": peak, "kept_mb": within_memory(kept) if work == "step" else None}


def figures(turns: Turns, name: str) -> Row:
    """What follows from the times of a candidate."""
    times = turns.spread(name) | turns.speed(name)
    if name == LIMIT:
        return times
    return times | {
        "speedup": turns.ratio(BASELINE, name),
        "over_minkowski": turns.ratio("minkowski", name),
        "over_limit": turns.ratio(name, LIMIT),
    }


def largest_batch(case: Case, work: str, backend: str) -> int:
    """The largest power of two of images of which twice as many fit into memory, up to MAX_BATCH; 0 if one does not.

    What is left is for the candidates that it takes turns with.
    """
    batch = 1
    while batch <= MAX_BATCH:
        build = builds(replace(case, batch=batch), work, [backend])[backend]
        if within_memory(partial(ready, build)) is None:
            return batch // 4 or batch // 2
        batch *= 2
    return MAX_BATCH
