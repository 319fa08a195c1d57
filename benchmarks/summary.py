"""A table of what rows of `bench throughput` show, for people: by machine, a line for each model and kind of work."""

import csv
from collections.abc import Iterator
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Any

from sparse_fcmae.benchmarks.config import SummaryConfig
from sparse_fcmae.benchmarks.gates import BASELINE
from sparse_fcmae.benchmarks.results import CSV_START, Row
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json, write_atomic
from sparse_fcmae.runtime.options import check, keywords_of

MARKS = ("<!-- bench summary -->", "<!-- end of bench summary -->")
WORDS = {"step": "encoder, forward and backward", "pretrain": "whole pretraining step"}
NOTHING = "Nothing was measured."
OURS, GATHER = "native", "torch"
TITLES = ("model, images, dtype", "work", "images/s", "over `masked`", "over `torch`", "peak MB, `masked`'s", "commit")
MACHINE = ("device", "cpu", "torch", "triton")
CASE = ("model", "batch_size", "dtype", "image_size", "mask_ratio", "commit", "date", "command")  # of one run


@keywords_of(SummaryConfig)
def summary(options: dict[str, Any]) -> str:
    """Returns the table, and puts it into a file if asked to. Raises UserError where there is nothing to show."""
    config = SummaryConfig(**options)
    check(config)
    text = summarise(read_rows(config.rows))
    if text == NOTHING:
        raise UserError(f"{config.rows} has no rows of `bench throughput` with times of {' or '.join(WORDS)}")
    if config.into:
        put_between_marks(text, Path(config.into))
    return text


def read_rows(place: str) -> list[Row]:
    """The rows, each with its environment, of the .json and .csv files that benchmarks wrote to a folder or pattern."""
    paths = sorted(Path(place).glob("*.*")) if Path(place).is_dir() else sorted(map(Path, glob(place)))
    if not paths:
        raise UserError(f"there is nothing at {place}")
    rows: list[Row] = []
    for path in filter(Path.is_file, paths):
        if path.suffix == ".json":
            found = read_json(path)
            if isinstance(found, dict) and {"benchmark", "environment", "rows"} <= found.keys():
                rows += [found["environment"] | {"benchmark": found["benchmark"]} | row for row in found["rows"]]
        elif path.suffix == ".csv" and path.read_text(errors="replace").startswith(CSV_START):
            with path.open(newline="") as file:
                rows += [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return rows


def summarise(rows: list[Row]) -> str:
    """A table in Markdown for each machine."""
    timed = [row for row in rows if row.get("ms") and row.get("work") in WORDS]
    tables = []
    for machine, group in _grouped(timed, MACHINE):
        lines = [" | ".join(TITLES), " | ".join("-" * len(title) for title in TITLES)]
        for _, of_case in _grouped(list(group), CASE):
            case = list(of_case)
            lines += [line for work in WORDS if (line := line_of([row for row in case if row["work"] == work]))]
        if len(lines) > 2:
            device, cpu, torch, triton = machine
            known = [cpu, f"torch {torch}"] if device == "cpu" else [device, f"torch {torch}", f"triton {triton}"]
            tables.append(f"{', '.join(known)}:\n\n" + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(tables) or NOTHING


def line_of(rows: list[Row]) -> str | None:
    """A line about the fastest way to run our backend, of the rows of one case and kind of work."""
    ours = [row for row in rows if row["candidate"].split(", ")[0] == OURS]
    if not ours:
        return None
    best, eager = max(ours, key=_speed), next((row for row in ours if row["candidate"] == OURS), {})
    others = {row["candidate"]: row for row in rows}
    size = "" if best["image_size"] == "224" else f", {best['image_size']} pixels"
    share = "" if float(best["mask_ratio"]) == 0.6 else f", {float(best['mask_ratio']):.0%} masked"
    how = best["candidate"].partition(", ")[2]
    peaks = [row.get("peak_mb") for row in (eager, others.get(BASELINE, {}))]
    cells = [
        f"{best['model']}, {best['batch_size']}, {best['dtype']}{size}{share}",
        WORDS[best["work"]] + (f", {how}" if how else ""),
        f"{_speed(best):,.0f}",
        f"{float(best['speedup']):.1f}" if best.get("speedup") else "",
        f"{_speed(best) / _speed(others[GATHER]):.1f}" if GATHER in others else "",
        ", ".join(f"{float(peak):,.0f}" if peak else "-" for peak in peaks) if any(peaks) else "",
        best["commit"],
    ]
    return " | ".join(cells)


def put_between_marks(text: str, path: Path) -> None:
    """Replaces what stands between MARKS in a file. Raises UserError where it has no such place."""
    try:
        before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
        _, after = rest.split(MARKS[1])
    except ValueError:
        raise UserError(f"`into` {path} needs one line {MARKS[0]} and after it one line {MARKS[1]}") from None
    whole = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
    write_atomic(path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))


def _grouped(rows: list[Row], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Iterator[Row]]]:
    """Rows by the values of keys, in the order in which these come first."""

    def values(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(key, "")) for key in keys)

    order = list(dict.fromkeys(map(values, rows)))
    return groupby(sorted(rows, key=lambda row: order.index(values(row))), values)


def _speed(row: Row) -> float:
    return float(row["images_per_second"])
