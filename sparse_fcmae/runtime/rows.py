"""The rows of a run's metrics, read on while the run writes them, and thinned to what a chart can show."""

import json
import math
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

MOST = 800  # points of a curve
DIGITS = 6


class Rows:
    """The rows of a file of JSON lines, as columns of numbers. A value that a row does not have, or null, is NaN.

    columns: by name. count: the rows. damaged: lines that are no rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin(())

    def _begin(self, file: tuple[Any, ...]) -> None:
        """Starts at the beginning of a file. file: by what it is known again."""
        self.file, self.place, self.count, self.damaged = file, 0, 0, 0
        self.columns: dict[str, array] = {}

    def read_on(self) -> None:
        """Reads the lines that are new and whole, or all of them where there is another file, as after a resumption."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._begin(())
            return
        with file:
            status = os.fstat(file.fileno())
            known = (status.st_dev, status.st_ino, file.readline())  # as a new file may get the number of a deleted one
            if known != self.file or status.st_size < self.place:
                self._begin(known)
            file.seek(self.place)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.place += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            found["step"] + 0
            row = {name: float(v) if isinstance(v, int | float) else math.nan for name, v in found.items()}
        except (ValueError, KeyError, TypeError, OverflowError):
            self.damaged += 1
            return
        for name in row:
            if name not in self.columns:
                self.columns[name] = array("d", [math.nan]) * self.count
        for name, column in self.columns.items():
            column.append(row.get(name, math.nan))
        self.count += 1

    def numbers(self, name: str) -> np.ndarray:
        """A column, float64 [count]."""
        return np.array(self.columns.get(name, array("d", [math.nan]) * self.count))

    def last(self, name: str) -> float | None:
        """The last number of a column that is finite, None where there is none."""
        return next((value for value in reversed(self.columns.get(name, ())) if math.isfinite(value)), None)

    def curve(self, name: str, scale: float = 1.0) -> dict[str, Any] | None:
        """A column over the steps, thinned to MOST points; None where it has no finite number.

        A point stands for `each` rows: it has the mean of their values, and where there are several also the least and
        the greatest, so that no peak is lost. It stands at the middle one of their steps.
        """
        values = scale * self.numbers(name)
        finite = np.isfinite(values)
        if not finite.any():
            return None
        values, steps, epochs = (part[finite] for part in (values, self.numbers("step"), self.numbers("epoch")))
        each = -(-len(values) // MOST)
        firsts = np.arange(0, len(values), each)
        lasts = np.append(firsts[1:], len(values)) - 1
        middle = (firsts + lasts) // 2
        sums, counts = np.add.reduceat(values, firsts), lasts - firsts + 1
        found = {"step": steps[middle], "epoch": epochs[middle], "value": sums / counts}
        if each > 1:
            found |= {"low": np.minimum.reduceat(values, firsts), "high": np.maximum.reduceat(values, firsts)}
        shown = {name: list(map(short, part.tolist())) for name, part in found.items()}
        return {"each": each, **shown, "step": steps[middle].astype(int).tolist()}


def short(value: float) -> float | None:
    """A number to DIGITS digits, None where it is not finite, as JSON has no such numbers."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
