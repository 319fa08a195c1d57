"""Rows of measurements: a table in the terminal, and JSON and CSV together with what the figures depend on."""

import csv
import os
import platform
import re
import shlex
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparse_fcmae import __version__
from sparse_fcmae.benchmarks.config import OutputConfig
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import check_writable, write_atomic
from sparse_fcmae.runtime.options import flag, options_of

Row = dict[str, Any]
Columns = dict[str, tuple[str, str]]  # key in the rows: title, format; a column that no row has is left out
CSV_START = "benchmark,"
OUTPUTS = ("json", "csv", "png")  # options that name a file to write
OTHERS = ("triton", "MinkowskiEngine", "timm", "transformers", "torchvision", "pillow")


def check_outputs(config: OutputConfig) -> None:
    """Raises UserError where the files asked for can't be written, before anything is measured."""
    files = {name: Path(path) for name in OUTPUTS if (path := getattr(config, name, None)) and path != "-"}
    if len({path.resolve() for path in files.values()}) < len(files):
        raise UserError(f"{' and '.join(f'`{name}`' for name in files)} can't be the same file")
    for path in files.values():
        check_writable(path)
    if config.csv and os.path.exists(config.csv):
        with open(config.csv, errors="replace") as file:
            if file.read(len(CSV_START)) not in ("", CSV_START):
                raise UserError(f"`csv` {config.csv}: rows are appended to a file of a benchmark's, which this is not")


def format_table(rows: list[Row], columns: Columns) -> str:
    """The rows below their titles, numbers to the right; where a row was refused, the reason."""
    columns = filled(columns, rows)
    cells = [[title for title, _ in columns.values()]]
    cells += [[as_text(row.get(key), spec) for key, (_, spec) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_left = [spec == "" for _, spec in columns.values()]
    lines = []
    for texts, note in zip(cells, ["", *(row.get("refused", "") for row in rows)], strict=True):
        placed = zip(texts, widths, to_left, strict=True)
        line = "  ".join(text.ljust(width) if left else text.rjust(width) for text, width, left in placed)
        lines.append(f"{line}  {note}".rstrip())
    return "\n".join(lines)


def filled(columns: Columns, rows: list[Row]) -> Columns:
    """The columns that any of the rows has a value in."""
    return {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}


def as_text(value: Any, spec: str) -> str:
    """A value as the tables have it; nothing for none."""
    return "" if value is None else format(value, spec)


def append_csv(path: Path, benchmark: str, setting: Row, rows: list[Row]) -> None:
    """Appends a line a row, with the environment behind the figures; columns that are new are added to the file's."""
    if not rows:
        return
    lines, known = [], ["benchmark"]
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines, known = list(reader), list(reader.fieldnames or known)
    # a row's own value, such as of threads that vary, stands before that of the environment
    lines += [{"benchmark": benchmark} | row | setting | row for row in rows]
    known += [key for key in dict.fromkeys(k for line in lines for k in line) if key not in known]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, known, restval="")
            writer.writeheader()
            writer.writerows(lines)

    write_atomic(path, write)


def environment(benchmark: str, config: Any, device: torch.device) -> Row:
    """What figures depend on beside their settings."""
    found = {
        "command": command(benchmark, config),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit() or __version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in OTHERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.type == "cuda":
        found["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def command(benchmark: str, config: Any) -> str:
    """The command line that measures these rows again, without the files that it is to write."""
    words = ["sparse-fcmae", "bench", benchmark]
    for f in options_of(type(config)):
        value = getattr(config, f.name)
        if f.name in (*OUTPUTS, "out", "overwrite") or value == f.default:
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
    """The CPU's name and those of its instruction sets that matter here, as far as the system tells."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    able = getattr(torch.cpu, "get_capabilities", dict)()
    sets = ", ".join(k for k in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if able.get(k))
    return f"{name} ({sets})" if sets else name


def output(*words: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
