"""What a run tells while it goes on.

That is a progress bar or, where nobody watches, a line now and then; train.log, metrics.jsonl, evaluations.jsonl; and
what the trackers of `writers` are told.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

from tqdm import tqdm

from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic, writing
from sparse_fcmae.runtime.terminal import lost_if_unread
from sparse_fcmae.training.measures import is_detail, is_fraction
from sparse_fcmae.training.writers import Writers

# of 80 columns, in which there is room for a million steps and days
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
REPLACED, LEFT_OUT = "unreadable, replaced by another image: ", "unreadable, left out of the evaluation: "
WORTH_SAYING = 0.1  # share of the time that images are waited for, from which on the bar says it


class Verdict(Protocol):
    """Whether a run goes well. Its text is the state, in a word or a few, and why."""

    state: str


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose output is no terminal but shows a bar all the same."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def bar_type() -> type[tqdm]:
    """The bar that suits where this process prints: a widget in a notebook, if ipywidgets is there."""
    if in_notebook():
        with suppress(ImportError):
            import ipywidgets  # noqa: F401 (which the widget misses only when it is made)
            from tqdm.notebook import tqdm as widget

            return widget
    return tqdm


class RunLog:
    """Writes a line of metrics for each step and one for each evaluation; it is silent on all ranks but the main one.

    run: the run's folder. step, steps: how many are done, and how many there are. Both files of lines are cut to the
    steps that are done, so that a resumed run goes on without a seam. trackers: told of the same.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        steps: int,
        main: bool,
        trackers: Writers | None = None,
    ) -> None:
        self.run, self.main = run, main
        if main:
            with writing(run):
                self.metrics, notes = _open_rows(run / "metrics.jsonl", step)
                known = (run / "evaluations.jsonl").exists()  # else it is made with the first evaluation
                self.evaluations, more = _open_rows(run / "evaluations.jsonl", step) if known else (None, [])
                self.text = (run / "train.log").open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        self.shows_bar = main and (sys.stderr.isatty() or in_notebook())
        self.bar = bar_type()(
            total=steps, initial=step, disable=not self.shows_bar, dynamic_ncols=True, smoothing=0.05, bar_format=BAR
        )
        self.since = time.perf_counter()
        self.left_out: set[str] = set()
        self.status = self.state = ""  # of the last steps, and of the run, as the last verdict says
        for note in (*notes, *more) if main else ():
            self.say(note)
        self.writers = trackers or Writers({}, usual=True)
        if main:
            self.writers.begin(run, step, self.say)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def say(self, message: str) -> None:
        """One line above the bar and into train.log."""
        if self.main:
            with lost_if_unread():
                self.bar.write(message)
            self.note(message)

    def note(self, message: str) -> None:
        """One line into train.log alone."""
        if not self.main:
            return
        with writing(self.run):
            self.text.write(_dated(message))

    def last_words(self, message: str) -> None:
        """One line into train.log by whichever rank is left to write it."""
        with (self.run / "train.log").open("a", encoding="utf-8", errors="backslashreplace") as text:
            text.write(_dated(message))

    def say_left_out(self, unreadable: Iterable[BadImage]) -> None:
        """Names each image once that an evaluation leaves out because it can't be read."""
        for name, reason in unreadable:
            if name not in self.left_out:
                self.left_out.add(name)
                self.say(f"{LEFT_OUT}{name}: {reason}")

    def steps(
        self,
        last: int,
        steps_per_epoch: int,
        losses: list[float],
        grad_norms: list[float],
        lrs: list[float],
        images: int,
        waited: float = 0.0,
        about: Callable[[float], dict[str, float]] = lambda speed: {},
    ) -> None:
        """Records the steps up to `last`, counted from 1: their losses, gradients' norms and learning rates.

        images: how many these steps took. waited: seconds of them in which no image was there to train on. about: what
        else there is to record, by the images a second.
        """
        now = time.perf_counter()
        speed, wait, self.since = images / (now - self.since), waited / (now - self.since), now
        shared = {"images_per_second": round(speed, 1), "data_wait": round(wait, 3), **about(speed)}
        steps = enumerate(zip(losses, grad_norms, lrs, strict=True), last - len(losses) + 1)
        rows = [(step, {"loss": loss, "grad_norm": norm, "lr": lr, **shared}) for step, (loss, norm, lr) in steps]
        if self.main:
            with writing(self.run):
                for step, row in rows:
                    self.metrics.write(as_row({"step": step, "epoch": round(step / steps_per_epoch, 4), **row}))
            self.writers.rows(rows)
        status = f"loss {losses[-1]:.4f}, {speed:.1f} images/s"
        waits = f", {wait:.0%} waiting for images" if wait > WORTH_SAYING else ""
        line = f"step {last}, {status}, lr {lrs[-1]:.2e}{waits}"
        with lost_if_unread():
            self.status = status + waits
            self.bar.set_postfix_str(self.status + self.state, refresh=False)
            self.bar.update(len(losses))
        if self.shows_bar:
            self.note(line)
        else:
            self.say(line)

    def evaluation(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Records what was measured after a step: fractions between 0 and 1, losses, and other numbers."""
        if not (self.main and values):
            return
        with writing(self.run):
            if not self.evaluations:
                self.evaluations, _ = _open_rows(self.run / "evaluations.jsonl", step)
            self.evaluations.write(as_row({"step": step, "epoch": round(epoch, 4), **values}))
        self.writers.rows([(step, values)])
        said = {name: value for name, value in values.items() if not is_detail(name)}
        shown = (f"{k} {100 * v:.2f} %" if is_fraction(k) else f"{k} {v:.4f}" for k, v in said.items())
        self.say(f"step {step}, epoch {epoch:g}: {', '.join(shown)}")
        self.since = time.perf_counter()  # evaluating is not training

    def verdict(self, verdict: "Verdict | None") -> None:
        """Says whether the run goes well, and keeps it in the bar."""
        if verdict:
            self.say(str(verdict))
            self.state = f", {verdict.state}"
            with lost_if_unread():
                self.bar.set_postfix_str(self.status + self.state)

    def draw(self, picture: Callable[[], None]) -> None:
        """Draws where matplotlib is installed."""
        try:
            picture()
        except ImportError:
            self.say("no curve is drawn, as matplotlib is not installed (extra: plots)")

    def sync(self) -> None:
        """Has the metrics reach the disk."""
        if self.main:
            with writing(self.run):
                os.fsync(self.metrics.fileno())
                if self.evaluations:
                    os.fsync(self.evaluations.fileno())

    def close(self) -> None:
        """Closes bar and files. What can't be written any more is an error before, and none again."""
        with lost_if_unread():
            self.bar.close()
        if self.main:
            with suppress(UserError):  # of a tracker that fails now, which train.log may not take any more either
                self.writers.close()
        for file in (self.metrics, self.evaluations, self.text) if self.main else ():
            if file:
                with suppress(OSError):
                    file.close()


def _dated(message: str) -> str:
    """A line of train.log."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n"


def as_row(values: dict[str, float]) -> str:
    """A line of JSON, which has no numbers that are not finite: null stands for them."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()}) + "\n"


def _open_rows(path: Path, start: int) -> tuple[TextIO, list[str]]:
    """The file to append to, without rows beyond the step `start`, of which there are none where that is 0.

    Returns with it a line that says how many lines were no rows, if any.
    """
    notes = []
    if path.exists():
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        kept = [line for line, step in zip(lines, steps, strict=True) if start and step is not None and step <= start]
        if damaged := sum(step is None for step in steps[:-1]):  # the last one may have been cut by a kill
            notes.append(f"left out of {path}, as they are no rows: {damaged} line{'s' if damaged > 1 else ''}")
        write_atomic(path, lambda p: p.write_text("".join(kept)))
    return path.open("a", buffering=1), notes


def _step_of(line: str) -> int | None:
    """The step that a whole row is of, None for anything else."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and line.endswith("\n") else None
