"""Backend against backend: the encoder's forward pass, that and its backward pass, whole pretraining steps.

All backends run on the same images, masks and weights, taking turns, so that the ratios hold on a noisy machine
although the times do not. A backend whose features or gradients are not those of `masked` is refused, not reported: in
float32 they must be equal, in bfloat16 as near to `masked` in float32 as `masked` in bfloat16 is, within a factor.
"""

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
from sparse_fcmae.benchmarks.steps import WORKS, Case, Run, builds, forward, matrix_products
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
    "over_limit": ("times the products", ".2f"),
    "peak_mb": ("peak MB", ".0f"),
    "kept_mb": ("kept MB", ".0f"),
    "forward_error": ("error of features", ".0e"),
    "gradient_error": ("of gradients", ".0e"),
}


def throughput(**options: Any) -> list[Row]:
    """Prints and returns a row a backend, kind of work and setting; options are those of `ThroughputConfig`.

    ms and quantiles are of one step; speedup and over_limit are medians over the rounds of the ratio of images/s to
    that of `masked`, and of that of the visible positions' matrix products alone to it.
    """
    config = ThroughputConfig(**options)
    if config.rounds < 1:
        raise UserError("--rounds must be at least 1")
    device = choose_device(config.device)
    works = listed("work", config.work, str, WORKS)
    names = list(BACKENDS) if config.backend == "all" else listed("backend", config.backend, str, BACKENDS)
    models = listed("model", config.model, str, SIZES)
    sizes = listed("image_size", config.image_size, image_size_of)
    ratios = listed("mask_ratio", config.mask_ratio, float)
    dtypes = listed("dtype", config.dtype, str, ("fp32", "bf16"))
    batches = listed("batch_size", config.batch_size, lambda text: text if text == "max" else int(text))
    if any(batch != "max" and batch < 1 for batch in batches):
        raise UserError("--batch-size must be at least 1, or max")
    for size, ratio in product(sizes, ratios):
        if Case("atto", size, ratio, 1, False, device).kept and not ratio and "pretrain" in works:
            raise UserError("pretraining needs masks: give a --mask-ratio greater than 0, or --work forward,step")
    results = Results("throughput", config, COLUMNS, device)
    if config.backend == "all":
        results.add([{"candidate": name, "refused": reason} for name, reason in PEERS.items()])
    torch.manual_seed(config.seed)
    with failing_beyond_memory():
        for model, size, ratio, dtype in product(models, sizes, ratios, dtypes):
            case = Case(model, size, ratio, GATE_BATCH, dtype == "bf16", device)
            usable, refused = [], {}
            for name in names:
                reason = BACKENDS[name].unusable(device, torch.bfloat16 if case.bf16 else torch.float32)
                refused |= {name: reason} if reason else {}
                usable += [] if reason else [name]
            checked = within_memory(partial(gate, case, usable))
            errors, exact = checked or ({}, [])
            refused |= {
                n: "features or gradients differ" if checked else OUT_OF_MEMORY for n in usable if n not in exact
            }
            setting = {"model": model, "image_size": shown_size(size), "mask_ratio": ratio, "dtype": dtype}
            rows = [{"candidate": name, "refused": reason} | errors.get(name, {}) for name, reason in refused.items()]
            results.add([setting | row for row in rows])
            for batch, work in product(batches, works):
                rows = measure(case, batch, work, exact, config)
                results.add([setting | row | errors.get(row["candidate"], {}) for row in rows])
    return results.finish()


def measure(case: Case, batch: int | str, work: str, backends: list[str], config: ThroughputConfig) -> list[Row]:
    """A row for each candidate; one that does not fit into memory says so."""
    torch.compiler.reset()  # or else the second batch size would be compiled for any
    batches = {name: largest_batch(case, work, name) if batch == "max" else batch for name in backends}
    rows: dict[str, Row] = {name: {} for name in backends}
    runs: dict[str, Run] = {}
    for size in set(batches.values()) - {0}:
        together = [name for name in backends if batches[name] == size]
        for name, build in builds(replace(case, batch=size), work, together, config.compiled).items():
            batches[name] = size
            built = within_memory(partial(after_one_run, build))
            rows[name] = {} if built else {"refused": OUT_OF_MEMORY}
            if built:
                runs[name] = built
                if "graph" not in name:  # which has taken its memory beforehand
                    rows[name]["peak_mb"] = peak_megabytes(built, case.device)
    rows |= {name: {"refused": OUT_OF_MEMORY} for name in backends if not batches[name]}
    if runs:
        batches[LIMIT] = max(batches[name] for name in runs)
        limit = within_memory(partial(matrix_products, replace(case, batch=batches[LIMIT]), work))
        runs |= {LIMIT: limit} if limit else {}
    times = within_memory(partial(take_turns, runs, config.rounds, case.device))
    for name in rows.keys() & runs.keys() if times is None else ():
        rows[name]["refused"] = f"{OUT_OF_MEMORY} beside the others"
    for name, seconds in (times or {}).items():
        each = [s / batches[name] for s in seconds]
        low, middle, high = (1e3 * float(q) for q in np.percentile(seconds, (20, 50, 80)))
        row = rows.setdefault(name, {})
        row |= {"p20_ms": low, "ms": middle, "p80_ms": high, "images_per_second": 1 / statistics.median(each)}
        if name == LIMIT:
            continue
        for other, key, inverted in ((BASELINE, "speedup", False), (LIMIT, "over_limit", True)):
            if other in times:
                ratios = [o / batches[other] / e for o, e in zip(times[other], each, strict=True)]
                row[key] = statistics.median(1 / r if inverted else r for r in ratios)
    if work == "step":
        for name in rows.keys() & runs.keys() & set(backends):
            rows[name]["kept_mb"] = kept_of_step(replace(case, batch=batches[name]), name)
    return [{"work": work, "batch_size": batches[name], "candidate": name, **row} for name, row in rows.items()]


def after_one_run(build: Callable[[], Run]) -> Run:
    """What is built, run once."""
    run = build()
    run()
    return run


def kept_of_step(case: Case, backend: str) -> float:
    encoder, (images, mask) = case.encoder(), case.inputs()
    return kept_megabytes(lambda: forward(encoder, backend, images, mask, case.kept, case.bf16))


def largest_batch(case: Case, work: str, backend: str) -> int:
    """The largest power of two of images that fits into memory, up to MAX_BATCH; 0 where one image does not."""
    fitting, batch = 0, 1
    while batch <= MAX_BATCH:
        build = builds(replace(case, batch=batch), work, [backend], compiled=False)[backend]
        if within_memory(partial(after_one_run, build)) is None:
            break
        fitting, batch = batch, 2 * batch
    return fitting


def gate(case: Case, backends: list[str]) -> tuple[dict[str, Row], list[str]]:
    """Errors of each backend's features and of all its gradients against BASELINE in float32, and who passes.

    In float32 the second error is the greatest of any parameter, in bfloat16 that of all of them as one vector.
    """
    encoder, (images, mask) = case.encoder(), case.inputs()
    probe = torch.randn(len(images), encoder.num_features, *case.grid, device=case.device)

    def values(backend: str, bf16: bool) -> tuple[Tensor, list[Tensor]]:
        encoder.zero_grad()
        features = forward(encoder, backend, images, mask, case.kept, bf16)
        (features.float() * probe).sum().backward()
        return features.detach(), [p.grad.clone() for p in encoder.parameters()]

    def error(backend: str, bf16: bool) -> tuple[float, float]:
        ours, grads = values(backend, bf16)
        if bf16:
            whole = (torch.cat([g.flatten() for g in s]) for s in (grads, gradients))
            return relative(ours, features), relative(*whole)
        return relative(ours, features), max(relative(a, b) for a, b in zip(grads, gradients, strict=True))

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features, gradients = values(BASELINE, bf16=False)
        errors = {name: error(name, bf16=False) for name in backends}
        passing = [n for n, (f, g) in errors.items() if f < FORWARD_TOLERANCE and g < GRADIENT_TOLERANCE]
        if case.bf16:
            limit = [ROUNDING_FACTOR * e for e in error(BASELINE, bf16=True)]
            rounded = {name: error(name, bf16=True) for name in passing}
            passing = [n for n, (f, g) in rounded.items() if f <= limit[0] and g <= limit[1]]
            errors |= rounded
    return {n: {"forward_error": f, "gradient_error": g} for n, (f, g) in errors.items()}, passing
