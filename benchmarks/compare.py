"""A whole training step of this package against what a user would take instead: fine-tuning, or pretraining.

All candidates have the same images and take turns. One that has our weights is refused where its logits are not those
of dense convolution in float32, and one of another architecture where its loss does not fall. A library that can't be
imported is named with the reason, and a candidate that does not fit into memory leaves the others alone.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sparse_fcmae.benchmarks.candidates import TASKS, Candidate
from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.benchmarks.timing import OUT_OF_MEMORY, failing_beyond_memory, take_turns, within_memory
from sparse_fcmae.config import CompareConfig, image_size_of
from sparse_fcmae.errors import UserError
from sparse_fcmae.training.distributed import choose_device

TOLERANCE = 1e-5  # relative Frobenius error of the logits, float32
GATE_STEPS = 5  # within which the loss has to fall
COLUMNS: Columns = {
    "candidate": ("a training step of", ""),
    "model": ("size", ""),
    "batch_size": ("batch", "d"),
    "image_size": ("pixels", ">"),
    "dtype": ("dtype", ""),
    "gmacs": ("GMACs", ".2f"),
    "ms": ("ms", ".1f"),
    "p20_ms": ("20 %", ".1f"),
    "p80_ms": ("80 %", ".1f"),
    "images_per_second": ("images/s", ".1f"),
    "ours_over_it": ("ours over it", ".2f"),
    "error": ("error of logits", ".0e"),
}


@failing_beyond_memory()
def compare(**options: Any) -> list[Row]:
    """Prints and returns a row a candidate; options are those of `CompareConfig`.

    gmacs: 1e9 multiply-accumulates of one image's forward pass. ours_over_it: its time by ours, the median of the
    rounds' ratios. Raises UserError for options that make no sense; what can't be measured has a row with the reason.
    """
    config = CompareConfig(**options)
    if config.task == "pretrain" and config.drop_path:
        raise UserError("--drop-path is of --task finetune: pretraining has none")
    device, size = choose_device(config.device), image_size_of(config.image_size)
    results = Results("compare", config, COLUMNS, device)
    torch.manual_seed(config.seed)
    builds = TASKS[config.task](config, size, device)

    fixed = {key: getattr(config, key) for key in ("task", "model", "batch_size", "image_size", "dtype", "drop_path")}
    rows: dict[str, Row] = {name: {"candidate": name} | fixed for name in builds}
    candidates: dict[str, Candidate] = {}
    for name, build in builds.items():
        try:
            built = within_memory(partial(gated, build))
        except UserError as error:
            rows[name]["refused"] = str(error)
            continue
        if built is None:
            rows[name]["refused"] = OUT_OF_MEMORY
            continue
        candidates[name], refused = built
        rows[name] |= {"gmacs": candidates[name].macs / 1e9, "error": candidates[name].error}
        if refused:
            rows[name]["refused"] = refused
            del candidates[name]

    def run(name: str) -> None:
        if name in candidates and within_memory(candidates[name].step) is None:
            rows[name]["refused"] = OUT_OF_MEMORY
            del candidates[name]

    runs = {name: partial(run, name) for name in candidates}
    times = within_memory(partial(take_turns, runs, config.rounds, device))
    if times is None:
        raise UserError("these do not fit into memory together: choose a smaller --batch-size or --model")
    ours = next(iter(builds))
    for name in candidates:
        rows[name] |= figures(times[name], config.batch_size)
        if ours in candidates:
            ratios = [t / o for o, t in zip(times[ours], times[name], strict=True)]
            rows[name]["ours_over_it"] = statistics.median(ratios)
    results.add(list(rows.values()))
    return results.finish()


def gated(build: Callable[[], Candidate]) -> tuple[Candidate, str | None]:
    """A candidate, and why it is refused if it is."""
    candidate = build()
    if candidate.error is not None:
        return candidate, None if candidate.error < TOLERANCE else f"its logits differ by {candidate.error:.0e}"
    losses = [candidate.step().item() for _ in range(GATE_STEPS)]
    if all(map(math.isfinite, losses)) and losses[-1] < losses[0]:
        return candidate, None
    return candidate, f"its loss does not fall: from {losses[0]:.4g} to {losses[-1]:.4g}"


def figures(seconds: list[float], batch: int) -> dict[str, float]:
    """A row's figures from a candidate's times."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(quantiles).tolist()
    return {"ms": 1e3 * median, "p20_ms": 1e3 * p20, "p80_ms": 1e3 * p80, "images_per_second": batch / median}
