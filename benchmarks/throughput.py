"""Backend against backend: the encoder's forward pass, that and its backward pass, whole pretraining steps.

All backends run on the same images, masks and weights, taking turns, so that the ratios hold on a noisy machine
although the times do not. A backend whose features, loss or gradients are not those of `masked` is refused, not
reported: in float32 they must be equal, in bfloat16 as near to `masked` in float32 as `masked` in bfloat16 is, within a
factor. A backend compiled or in a CUDA graph must give what it gives plainly.
"""

import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.benchmarks.steps import WORKS, Case, Run, builds, computed, matrix_products
from sparse_fcmae.benchmarks.timing import (
    OUT_OF_MEMORY,
    failing_beyond_memory,
    kept_megabytes,
    peak_megabytes,
    relative,
    take_turns,
    within_memory,
)
from sparse_fcmae.config import ThroughputConfig, image_size_of, listed, shown_size
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.errors import UserError
from sparse_fcmae.training.distributed import choose_device

BASELINE = "masked"
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative Frobenius error, float32
ROUNDING_FACTOR = 2  # of the baseline's own bfloat16 error
LOSS_ROUNDING = 1e-3  # of the loss in bfloat16, relative, that is allowed for at least
VARIANT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "loss": 1e-2}  # relative, of a variant against its backend
GATE_BATCH = 8
PEERS = {  # that can't be measured, and why
    "spconv": "has no depthwise convolution: its groups must be 1",
    "WarpConvNet": "runs on CUDA devices alone, and there is no backend of it here",
}
MAX_BATCH = 1 << 14  # where the search for the largest one ends
LIMIT = "matrix products"
CROWDED = f"{OUT_OF_MEMORY} beside the others"
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


@failing_beyond_memory()
def throughput(**options: Any) -> list[Row]:
    """Prints and returns a row a backend, kind of work and setting; options are those of `ThroughputConfig`.

    ms and quantiles are of one step; speedup and over_limit are medians over the rounds of the ratio of images/s to
    that of `masked`, and of that of the visible positions' matrix products alone to it.
    """
    config = ThroughputConfig(**options)
    results = Results("throughput", config, COLUMNS, device := choose_device(config.device))
    works = listed("work", config.work, str, WORKS)
    names = list(BACKENDS) if config.backend == "all" else listed("backend", config.backend, str, BACKENDS)
    models = listed("model", config.model, str, SIZES)
    sizes = listed("image_size", config.image_size, image_size_of)
    ratios = listed("mask_ratio", config.mask_ratio, float)
    dtypes = listed("dtype", config.dtype, str, ("fp32", "bf16"))
    batches = listed("batch_size", config.batch_size, lambda text: text if text == "max" else int(text))
    if any(batch != "max" and not 1 <= batch <= MAX_BATCH for batch in batches):
        raise UserError(f"--batch-size must be from 1 to {MAX_BATCH}, or max, not {config.batch_size}")
    cases = [
        Case(model, size, ratio, GATE_BATCH, dtype == "bf16", device)
        for model, size, ratio, dtype in product(models, sizes, ratios, dtypes)
    ]
    for case in cases:
        if case.kept and not case.mask_ratio and "pretrain" in works:
            raise UserError("pretraining needs masks: give a --mask-ratio greater than 0, or --work forward,step")
    check_usable(names, {case.dtype for case in cases}, device)
    torch.manual_seed(config.seed)
    for case in cases:
        setting = {"model": case.model_name, "image_size": shown_size(case.size), "mask_ratio": case.mask_ratio}
        setting |= {"dtype": "bf16" if case.bf16 else "fp32"}
        gates = {kind: gated(case, kind, names) for kind in dict.fromkeys(gate_of(work) for work in works)}
        refused = {name: reason for _, reasons in gates.values() for name, reason in reasons.items()}
        results.add([setting | {"candidate": name, "refused": reason} for name, reason in refused.items()])
        for batch, work in product(batches, works):
            errors, _ = gates[gate_of(work)]
            exact = [name for name in names if name not in refused]
            rows = measure(case, batch, work, exact, config)
            results.add([setting | row | errors.get(row["candidate"], {}) for row in rows])
    if config.backend == "all":
        results.add(absent_peers())
    return results.finish()


def check_usable(backends: list[str], dtypes: set[torch.dtype], device: torch.device) -> None:
    """Raises UserError, with the reasons, where none of the backends can be used with any of the dtypes."""
    reasons = [BACKENDS[name].unusable(device, dtype) for name in backends for dtype in dtypes]
    if all(reasons):
        raise UserError("; ".join(dict.fromkeys(reasons)))


def absent_peers() -> list[Row]:
    """Rows for what can't be measured, with the reason."""
    rows = []
    for name, reason in PEERS.items():
        there = "" if importlib.util.find_spec(name.lower()) else "not installed, and "
        rows.append({"candidate": name, "refused": there + reason})
    return rows


def measure(case: Case, batch: int | str, work: str, backends: list[str], config: ThroughputConfig) -> list[Row]:
    """A row for each candidate; one that does not fit into memory says so, and so does a variant that is not exact."""
    if batch != "max":
        return take_turns_at(dict.fromkeys(backends, batch), case, work, config)
    batches = {name: largest_batch(case, work, name) for name in backends}
    while True:  # what fits alone may not fit beside the others
        rows = take_turns_at(batches, case, work, config, variants=False)
        if max(batches.values(), default=0) <= 1 or not any(row.get("refused") == CROWDED for row in rows):
            return rows
        batches = {name: max(size // 2, min(size, 1)) for name, size in batches.items()}


def take_turns_at(
    batches: dict[str, int], case: Case, work: str, config: ThroughputConfig, variants: bool = True
) -> list[Row]:
    """The rows of backends, and of their variants if wanted, at a batch size each, 0 for one of which none fits."""
    torch.compiler.reset()  # or else the second batch size would be compiled for any
    backends, batches = list(batches), dict(batches)
    rows: dict[str, Row] = {name: {} if batches[name] else {"refused": OUT_OF_MEMORY} for name in backends}
    runs: dict[str, Run] = {}
    for size in sorted(set(batches.values()) - {0}):
        together = [name for name in backends if batches[name] == size]
        sized = replace(case, batch=size)
        for name, build in builds(sized, work, together, config.compiled).items():
            if name not in backends and not variants:
                continue  # a graph's own memory would leave too little to the others
            batches[name], rows[name] = size, {}
            run = within_memory(partial(after_one_run, build))
            if run is None:
                rows[name]["refused"] = OUT_OF_MEMORY
                continue
            plain = runs.get(name.split(", ")[0])
            if name not in backends and not (plain and alike(run, plain, work, case.bf16, config.seed)):
                rows[name]["refused"] = "what it computes differs"
                continue
            runs[name] = run
            if name in backends:  # the others have taken their memory beforehand
                rows[name]["peak_mb"] = within_memory(partial(peak_megabytes, run, case.device))
                rows[name]["kept_mb"] = within_memory(partial(kept_of_step, sized, name)) if work == "step" else None
    if runs:
        batches[LIMIT] = min(batches[name] for name in runs)
        products = partial(matrix_products, replace(case, batch=batches[LIMIT]), work)
        limit = within_memory(partial(after_one_run, products))
        runs |= {LIMIT: limit} if limit else {}
    times = within_memory(partial(take_turns, runs, config.rounds, case.device, ready=True))
    for name in runs.keys() - {LIMIT} if times is None else ():
        rows[name]["refused"] = CROWDED
    each = {name: [s / batches[name] for s in seconds] for name, seconds in (times or {}).items()}
    for name, seconds in (times or {}).items():
        low, middle, high = (1e3 * float(q) for q in np.percentile(seconds, (20, 50, 80)))
        row = rows.setdefault(name, {})
        row |= {"p20_ms": low, "ms": middle, "p80_ms": high, "images_per_second": 1 / statistics.median(each[name])}
        if name != LIMIT:
            row |= {"speedup": ratio(each, BASELINE, name), "over_minkowski": ratio(each, "minkowski", name)}
            row["over_limit"] = ratio(each, name, LIMIT)
    return [{"work": work, "batch_size": batches[name], "candidate": name, **row} for name, row in rows.items()]


def ratio(times: dict[Any, list[float]], slower: Any, faster: Any) -> float | None:
    """The median over the rounds of one's time by the other's, where both are there."""
    if slower not in times or faster not in times:
        return None
    return statistics.median(s / f for s, f in zip(times[slower], times[faster], strict=True))


def alike(run: Run, plain: Run, work: str, bf16: bool, seed: int) -> bool:
    """Whether a variant computes what its backend does, on the same masks."""
    results = []
    for candidate in (run, plain):
        torch.manual_seed(seed)
        results.append(torch.cat([t.detach().flatten().float() for t in candidate()]))
    tolerance = VARIANT_TOLERANCE["loss" if work == "pretrain" else "bf16" if bf16 else "fp32"]
    return relative(*results) < tolerance


def after_one_run(build: Callable[[], Run]) -> Run:
    """What is built, run once."""
    run = build()
    run()
    return run


def kept_of_step(case: Case, backend: str) -> float:
    encoder, (images, mask) = case.model("step"), case.inputs()
    return kept_megabytes(lambda: computed(encoder, backend, images, mask, case))


def largest_batch(case: Case, work: str, backend: str) -> int:
    """The largest power of two of images of which twice as many fit into memory, up to MAX_BATCH; 0 if one does not.

    What is left is for the candidates that it takes turns with.
    """
    batch = 1
    while batch <= MAX_BATCH:
        build = builds(replace(case, batch=batch), work, [backend])[backend]
        if within_memory(partial(after_one_run, build)) is None:
            return batch // 4 or batch // 2
        batch *= 2
    return MAX_BATCH


def gate_of(work: str) -> str:
    """The kind of work by whose results backends are checked."""
    return "pretrain" if work == "pretrain" else "step"


def gated(case: Case, work: str, names: list[str]) -> tuple[dict[str, Row], dict[str, str]]:
    """Errors of the backends that can run, as columns of a row, and why the others can't or are not exact."""
    reasons = {name: BACKENDS[name].unusable(case.device, case.dtype) for name in names}
    usable = [name for name, reason in reasons.items() if not reason]
    checked = within_memory(partial(gate, case, work, usable))
    errors, exact = checked or ({}, [])
    wrong = OUT_OF_MEMORY if checked is None else f"{'loss' if work == 'pretrain' else 'features'} or gradients differ"
    return errors, {name: reasons[name] or wrong for name in names if name not in exact}


def gate(case: Case, work: str, backends: list[str]) -> tuple[dict[str, Row], list[str]]:
    """Errors of each backend's features or loss and of all gradients against BASELINE in float32, and who passes.

    In float32 the second error is the greatest of any parameter, in bfloat16 that of all of them as one vector.
    """
    model, (images, mask) = case.model(work), case.inputs()
    exactly = replace(case, bf16=False)
    probe = torch.ones((), device=case.device)
    if work != "pretrain":
        probe = torch.randn(len(images), model.num_features, *case.grid, device=case.device)

    def values(backend: str, case: Case) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        result = computed(model, backend, images, mask, case)
        (result.float() * probe).sum().backward()
        return result.detach(), [p.grad.clone() for p in model.parameters()]

    def error(backend: str, case: Case) -> tuple[float, float]:
        result, grads = values(backend, case)
        if case.bf16:
            whole = (torch.cat([g.flatten() for g in s]) for s in (grads, gradients))
            return relative(result, expected), relative(*whole)
        return relative(result, expected), max(relative(a, b) for a, b in zip(grads, gradients, strict=True))

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, gradients = values(BASELINE, exactly)
        errors = {name: error(name, exactly) for name in backends}
        passing = [n for n, (f, g) in errors.items() if f < FORWARD_TOLERANCE and g < GRADIENT_TOLERANCE]
        if case.bf16:
            own = error(BASELINE, case)
            limit = [
                ROUNDING_FACTOR * max(own[0], LOSS_ROUNDING if work == "pretrain" else 0),
                ROUNDING_FACTOR * own[1],
            ]
            rounded = {name: error(name, case) for name in passing}
            passing = [n for n, (f, g) in rounded.items() if f <= limit[0] and g <= limit[1]]
            errors |= rounded
    return {n: {"forward_error": f, "gradient_error": g} for n, (f, g) in errors.items()}, passing
