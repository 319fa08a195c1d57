"""The command `runs`: the runs below a folder, how far they are, and which of them goes on at this moment."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sparse_fcmae.runtime.checkpoint_folder import CHECKPOINTS, checkpoints_in, is_exported, step_of
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json
from sparse_fcmae.runtime.lock import is_locked
from sparse_fcmae.runtime.options import check, keywords_of
from sparse_fcmae.runtime.run_folder import CONFIG
from sparse_fcmae.training.config import RunsConfig
from sparse_fcmae.training.lr_range import STEPS

FORMAT = "sparse-fcmae "  # how the format of a run's config.json begins
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that are read for the last step


class Found(NamedTuple):
    """A run. step, steps: that are done, and in all. images_per_second: at its last step. seconds: since it wrote."""

    path: Path
    task: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    images_per_second: float | None
    seconds: float


@keywords_of(RunsConfig)
def runs(options: dict[str, Any]) -> str:
    """A table of the runs below a folder. Raises UserError where there is no such folder."""
    config = RunsConfig(**options)
    check(config)
    root = Path(config.folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = list(_runs_below(root))
    if not found:
        raise UserError(f"{root}: no run in this folder or below it")
    table = [("run", "task", "state", "step", "loss", "images/s", "last written")]
    table += [_row(run) for run in sorted(found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


def _runs_below(root: Path) -> Iterator[Found]:
    """The runs in a folder and below it. What a run's own folder holds is not looked into."""
    for folder, names, _ in os.walk(root):
        if run := look_at(Path(folder)):
            names.clear()
            yield run


def look_at(folder: Path) -> Found | None:
    """The run in a folder, None where it holds none."""
    if not ((folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()):
        return None
    try:
        config = read_json(folder / CONFIG)
        form = config["format"]
    except (UserError, KeyError, TypeError):
        return None
    if not (isinstance(form, str) and form.startswith(FORMAT) and form.endswith(" run")):
        return None
    row, saved = _last_row(folder / "metrics.jsonl"), checkpoints_in(folder)
    step, steps = row.get("step", 0), None
    if row.get("epoch") and isinstance(config.get("epochs"), int):
        of_epochs = STEPS if config.get("lr_range") else config["epochs"] * round(step / row["epoch"])
        steps = config.get("max_steps") or of_epochs
    newest = step_of(saved[0]) if saved else 0
    ended = (steps is not None and newest >= steps) or bool(config.get("patience") and saved)
    if is_locked(folder):
        state = "running"
    elif ended and is_exported(folder):
        state = "finished"
    else:
        state = f"stopped, checkpoint at {newest}" if newest else "stopped, no checkpoint"
    log = folder / "train.log"
    written = (log if log.is_file() else folder / CONFIG).stat().st_mtime
    task = form.removeprefix(FORMAT).removesuffix(" run")
    speed = row.get("images_per_second")
    return Found(folder, task, state, step, steps, row.get("loss"), speed, max(0.0, time.time() - written))


def _last_row(metrics: Path) -> dict[str, Any]:
    """The last whole row of a file of metrics, empty where there is none."""
    if not metrics.is_file():
        return {}
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        lines = file.read().splitlines(keepends=True)
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return {}


def _row(run: Found) -> tuple[str, ...]:
    step = f"{run.step} of {run.steps}" if run.steps else str(run.step)
    loss = "" if run.loss is None else f"{run.loss:.4f}"
    speed = "" if run.images_per_second is None else f"{run.images_per_second:.0f}"
    return str(run.path), run.task, run.state, step, loss, speed, f"{_ago(run.seconds)} ago"


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
