"""Rows of measurements: a table in the terminal, and JSON and CSV together with what the figures depend on."""

import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparse_fcmae import __version__
from sparse_fcmae.config import OutputConfig, flag
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import check_writable, write_atomic, write_json
from sparse_fcmae.training.configure import check_values

Row = dict[str, Any]
Columns = dict[str, tuple[str, str]]  # key in the rows: title, format; a column that no row has is left out
CSV_START = "benchmark,"
MOST = 1 << 24
OTHERS = ("triton", "MinkowskiEngine", "timm", "transformers", "torchvision", "pillow")


class Results:
    """The rows of a benchmark as they come: each table is printed and appended to the CSV file at once, so that an
    interrupted one keeps what it has; the JSON is written at the end.

    With `--json -` the JSON goes to the standard output and the tables to the standard error. Raises UserError for
    numbers that make no sense and files that can't be written, before anything is measured.
    """

    def __init__(self, benchmark: str, config: OutputConfig, columns: Columns, device: torch.device) -> None:
        check(config)
        self.config, self.columns, self.rows = config, columns, []
        self.result = {"benchmark": benchmark, "environment": environment(benchmark, config, device), "rows": self.rows}

    def add(self, rows: list[Row], shown: list[Row] | None = None) -> None:
        """Takes rows, and prints them or those that are to be `shown`."""
        self.rows += rows
        if table := format_table(rows if shown is None else shown, self.columns):
            print(table, file=sys.stderr if self.config.json == "-" else sys.stdout, flush=True)
        if self.config.csv:
            append_csv(Path(self.config.csv), self.result | {"rows": rows})

    def finish(self) -> list[Row]:
        """Writes the JSON; returns all rows."""
        if self.config.json == "-":
            print(json.dumps(self.result, indent=2))
        elif self.config.json:
            write_json(Path(self.config.json), self.result)
        return self.rows


def check(config: OutputConfig) -> None:
    """Raises UserError where numbers make no sense or the files asked for can't be written."""
    check_numbers(config)
    files = {name: getattr(config, name, None) for name in ("json", "csv", "png")}
    files = {name: Path(path) for name, path in files.items() if path and path != "-"}
    if len({path.resolve() for path in files.values()}) < len(files):
        raise UserError(f"{' and '.join(map(flag, files))} can't be the same file")
    for path in files.values():
        check_writable(path)
    if config.csv and os.path.exists(config.csv):
        with open(config.csv, errors="replace") as file:
            if file.read(len(CSV_START)) not in ("", CSV_START):
                raise UserError(f"--csv {config.csv}: rows are appended to a file of a benchmark's, which this is not")


def check_numbers(config: Any) -> None:
    """Raises UserError where a number of a benchmark's config makes no sense."""
    numbers = {f.name for f in fields(config) if isinstance(getattr(config, f.name), int)}
    positive = sorted(numbers & {"batch_size", "rounds", "images"})
    check_values(config, positive, numbers & {"seed"})
    for name in positive:
        if getattr(config, name) > MOST:
            raise UserError(f"{flag(name)} must be at most {MOST}, not {getattr(config, name)}")


def format_table(rows: list[Row], columns: Columns) -> str:
    """The rows below their titles, numbers to the right; where a row was refused, the reason. Nothing of no rows."""
    if not rows:
        return ""
    columns = {k: c for k, c in columns.items() if any(row.get(k) is not None for row in rows)}
    cells = [[as_text(row.get(key), spec) for key, (_, spec) in columns.items()] for row in rows]
    titles = [title for title, _ in columns.values()]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    left = [spec == "" for _, spec in columns.values()]

    def line(texts: list[str]) -> str:
        placed = zip(texts, widths, left, strict=True)
        return "  ".join(t.ljust(w) if to_left else t.rjust(w) for t, w, to_left in placed)

    rest = [row.get("refused") or "" for row in rows]
    return "\n".join(
        [line(titles).rstrip(), *(f"{line(c)}  {note}".rstrip() for c, note in zip(cells, rest, strict=True))]
    )


def as_text(value: Any, spec: str) -> str:
    """A value as the tables have it; nothing for none."""
    return "" if value is None else format(value, spec)


def append_csv(path: Path, result: dict[str, Any]) -> None:
    """Appends a line a row, with the environment behind the figures; columns that are new are added to the file's."""
    lines, known = [], ["benchmark"]
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines, known = list(reader), list(reader.fieldnames or known)
    lines += [{"benchmark": result["benchmark"]} | row | result["environment"] for row in result["rows"]]
    known += [key for key in dict.fromkeys(k for line in lines for k in line) if key not in known]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, known, restval="")
            writer.writeheader()
            writer.writerows(lines)

    write_atomic(path, write)


def environment(benchmark: str, config: OutputConfig, device: torch.device) -> dict[str, Any]:
    """What figures depend on beside their settings."""
    return {
        "command": command(benchmark, config),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit() or __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found for name in OTHERS if (found := installed(name))},
        **(
            {"driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
            if device.type == "cuda"
            else {}
        ),
    }


def command(benchmark: str, config: OutputConfig) -> str:
    """The command line that measures these rows again."""
    words = ["sparse-fcmae", "bench", benchmark]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in ("json", "csv", "png", "out", "overwrite") or value == f.default:
            continue
        if f.name == "data":  # whose place is another on every machine
            value = "IMAGES"
        words += [flag(f.name)] if value is True else [flag(f.name), str(value)]
    return shlex.join(words)


def commit() -> str:
    """The commit of this checkout, marked where files differ from it; nothing for an installed package."""
    here = str(Path(__file__).parent)
    if not output("git", "-C", here, "ls-files", "results.py"):
        return ""
    return output("git", "-C", here, "describe", "--always", "--dirty", "--exclude", "*")


def cpu_model() -> str:
    """The CPU's name and instruction sets that matter here, as far as the system tells."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    able = getattr(torch.cpu, "get_capabilities", dict)()
    sets = ", ".join(k for k in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if able.get(k))
    return f"{name} ({sets})" if sets else name


def installed(name: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def output(*words: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
