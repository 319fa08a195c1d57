"""What a benchmark is, and how the candidates that it compares are checked and timed.

A benchmark goes through its cases, such as every model in every dtype. For each case it names the candidates, such as
the backends, with the gate that each has to pass. `take_turns` times those that pass and gives their rows.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch

from sparse_fcmae.benchmarks.memory import OUT_OF_MEMORY, failing_beyond_memory, within_memory
from sparse_fcmae.benchmarks.results import Columns, Row, append_csv, check_outputs, environment, format_table
from sparse_fcmae.runtime.device import choose_device
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_json
from sparse_fcmae.runtime.options import check, keywords_of

P = ParamSpec("P")
Run = Callable[[], Any]
Gate = Callable[[Any, Mapping[Hashable, Any]], Row]
Measure = Callable[[Any, torch.device], Iterator[list[Row]]]
FILLED_BYTES = 1 << 30  # a third of a millisecond on a GPU of 2023, whose caches have 50 MB
CROWDED = f"{OUT_OF_MEMORY} beside the others"


def benchmark(
    name: str,
    config: Callable[P, Any],
    columns: Columns,
    *,
    shows: Callable[[Any, Row], bool] = lambda config, row: True,
    threads: int | None = None,
) -> Callable[[Measure], Callable[P, list[Row]]]:
    """Makes a benchmark of a function that, given the options and the device, yields the rows of a table at a time.

    The benchmark takes the fields of `config` as keywords, prints the tables, writes the files asked for and returns
    all rows. The function raises UserError for options that make no sense, before it measures anything.

    name: of the command. columns: of the tables. shows: whether a row is printed, given the options; all are saved.
    threads: that torch computes by, None for as many as it does otherwise.
    """

    def decorate(measure: Measure) -> Callable[P, list[Row]]:
        def run(options: dict[str, Any]) -> list[Row]:
            chosen = config(**options)
            check(chosen)
            check_outputs(chosen)
            device = choose_device(getattr(chosen, "device", "cpu"))
            with torch_threads(threads), failing_beyond_memory():
                setting, all_rows = environment(name, chosen, device), []
                torch.manual_seed(getattr(chosen, "seed", 0))
                for rows in measure(chosen, device):
                    all_rows += rows
                    if shown := [row for row in rows if shows(chosen, row)]:
                        file = sys.stderr if chosen.json == "-" else sys.stdout
                        print(format_table(shown, columns), file=file, flush=True)
                    if chosen.csv:  # at once, so that an interrupted benchmark keeps what it has
                        append_csv(Path(chosen.csv), name, setting, rows)
            result = {"benchmark": name, "environment": setting, "rows": all_rows}
            if chosen.json == "-":
                print(json.dumps(result, indent=2))
            elif chosen.json:
                write_json(Path(chosen.json), result)
            return all_rows

        run.__doc__, run.__name__, run.__module__ = measure.__doc__, measure.__name__, measure.__module__
        run.columns = columns  # for the report's page
        return keywords_of(config)(run)

    return decorate


@dataclass(frozen=True)
class Candidate:
    """One of those that take turns.

    build: makes what is timed, a function without arguments. It raises UserError where that can't be had here.
    row: the columns that are known beforehand. A candidate that has "refused" among them is not built.
    images: how many a run goes through.
    gate: gives further columns, found out about what was built. It gets that, and by name what passed before. Where it
    gives "refused" too, which says why, what was built is not timed.
    """

    name: Hashable
    build: Callable[[], Run]
    row: Row = field(default_factory=dict)
    images: int = 1
    gate: Gate = lambda run, passed: {}


@dataclass(frozen=True)
class Turns:
    """What came of candidates that took turns.

    rows: of all of them. seconds: of each round, of those that were timed. images: of a run.
    """

    rows: dict[Hashable, Row]
    seconds: dict[Hashable, list[float]]
    images: dict[Hashable, int]

    def ratio(self, slower: Hashable, *faster: Hashable) -> float | None:
        """The median over the rounds of one's time for an image by the least of the others' in the same round.

        None where it, or all of the others, were not timed.
        """
        timed = [name for name in faster if name in self.seconds]
        if slower not in self.seconds or not timed:
            return None
        least = (min(times) for times in zip(*map(self._seconds_an_image, timed), strict=True))
        return statistics.median(s / f for s, f in zip(self._seconds_an_image(slower), least, strict=True))

    def _seconds_an_image(self, name: Hashable) -> list[float]:
        return [seconds / self.images[name] for seconds in self.seconds[name]]

    def table(self, figures: Callable[[Hashable], Row]) -> list[Row]:
        """All rows, those of the timed ones with their speed and further columns."""
        for name in self.seconds:
            self.rows[name] |= self.speed(name) | figures(name)
        return list(self.rows.values())

    def speed(self, name: Hashable) -> Row:
        """Columns of the median time."""
        median = statistics.median(self.seconds[name])
        return {"ms": 1e3 * median, "images_per_second": self.images[name] / median}

    def spread(self, name: Hashable) -> Row:
        """Columns of how far the times are apart."""
        low, high = (1e3 * float(quantile) for quantile in np.percentile(self.seconds[name], (20, 80)))
        return {"p20_ms": low, "p80_ms": high}


def take_turns(candidates: Iterable[Candidate], rounds: int, device: torch.device) -> Turns:
    """Builds every candidate, has it pass its gate and run once, then times those that pass, one after the other.

    The seconds of a round belong together, so that ratios hold on a machine whose speed changes. What is refused, can't
    be had or does not fit into memory has the reason in its row, and the others go on.
    """
    candidates = list(candidates)
    rows = {candidate.name: dict(candidate.row) for candidate in candidates}
    runs: dict[Hashable, Run] = {}
    for candidate in candidates:
        if "refused" not in candidate.row:
            rows[candidate.name] |= attempt(partial(_admit, candidate, runs))
    seconds: dict[Hashable, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in list(runs):
            spent = within_memory(partial(_seconds, runs[name], device))
            if spent is None:
                rows[name]["refused"] = CROWDED
                del runs[name], seconds[name]
            else:
                seconds[name].append(spent)
    return Turns(rows, seconds, {candidate.name: candidate.images for candidate in candidates})


def _admit(candidate: Candidate, runs: dict[Hashable, Run]) -> Row:
    """Puts what a candidate builds among the runs, where it passes its gate. Returns what the gate gives."""
    run = candidate.build()
    found = candidate.gate(run, runs)
    if "refused" not in found:
        run()
        runs[candidate.name] = run
    return found


def attempt(do: Callable[[], Row]) -> Row:
    """The columns that `do` finds out. Where it raises UserError or lacks memory, "refused" with the reason."""
    try:
        row = within_memory(do)
    except UserError as error:
        return {"refused": str(error)}
    return {"refused": OUT_OF_MEMORY} if row is None else row


def _seconds(run: Run, device: torch.device) -> float:
    """How long a run takes, on a GPU by the device's own clock.

    Filling memory first empties a GPU's caches, and lets the host be ahead of the device where it is faster.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(FILLED_BYTES, dtype=torch.uint8, device=device).zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Has torch compute by so many threads; None for as many as it does anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
