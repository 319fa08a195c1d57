"""The whole suite on this machine: one HTML page that needs nothing else, plots as PNG, rows as JSON and CSV.

`SECTIONS` says which benchmarks it has, in which cases, and how their rows are drawn. A line there and a heading in
`report.html` put a new benchmark on the page.
"""

import traceback
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from sparse_fcmae.backends import BACKENDS, choose_dtype
from sparse_fcmae.benchmarks import plots
from sparse_fcmae.benchmarks.compare import compare
from sparse_fcmae.benchmarks.config import ReportConfig
from sparse_fcmae.benchmarks.data import data
from sparse_fcmae.benchmarks.gflops import gflops
from sparse_fcmae.benchmarks.kernels import kernels
from sparse_fcmae.benchmarks.pretraining import pretraining
from sparse_fcmae.benchmarks.results import Columns, Row, append_csv, as_text, environment, filled
from sparse_fcmae.benchmarks.scaling import scaling
from sparse_fcmae.benchmarks.throughput import absent_peers, throughput
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.runtime.device import choose_device
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import new_folder, one_line, read_json, write_atomic, write_json
from sparse_fcmae.runtime.options import check, keywords_of, listed

PAGE, ROWS, TABLE = "report.html", "rows.json", "rows.csv"
Options = dict[str, Any]
BATCHES = {"atto": 32, "femto": 32, "pico": 16, "nano": 16, "tiny": 8, "base": 4, "large": 2, "huge": 1}  # on a CPU
GPU_SCALE = 16  # times as many on a GPU
SLOW_BF16 = "this machine has no instructions for it, so that it is slower than fp32"


class Section(NamedTuple):
    """A part of the page. benchmark: what measures its rows. plots: name of the file -> what draws the rows."""

    benchmark: Callable[..., list[Row]]
    plots: dict[str, Callable[[list[Row]], Any]]


SECTIONS = {
    "gflops": Section(gflops, {"gflops": plots.draw_gflops}),
    "throughput": Section(
        throughput, {"throughput": plots.draw_speedups, "limit": plots.draw_limits, "memory": plots.draw_memory}
    ),
    "mask ratio": Section(scaling, {"scaling-mask-ratio": plots.draw_scaling}),
    "image size": Section(scaling, {"scaling-image-size": plots.draw_scaling}),
    "compare": Section(compare, {"compare": plots.draw_speeds}),
    "autoencoders": Section(compare, {"autoencoders": plots.draw_speeds}),
    "kernels": Section(kernels, {"kernels": plots.draw_bounds}),
    "data": Section(data, {"data": plots.draw_speeds}),
    "pretrain": Section(pretraining, {"pretrain": plots.draw_parts}),
}
WRITTEN = {PAGE, ROWS, TABLE, *(f"{file}.png" for section in SECTIONS.values() for file in section.plots)}


def plan(config: ReportConfig, models: list[str], device: torch.device) -> dict[str, list[Options]]:
    """The options of each time that a section's benchmark runs: few enough images for a usual machine."""
    common, scale = {"rounds": config.rounds, "seed": config.seed}, GPU_SCALE if device.type == "cuda" else 1

    def step_of(model: str, **others: Any) -> Options:
        return common | {"device": config.device, "model": model, "batch_size": scale * BATCHES[model]} | others

    first, few = models[0], min(3, config.rounds)
    dtypes = ["fp32", "bf16"] if fast_bf16(device) else ["fp32"]
    return {
        "gflops": [{}],
        "throughput": [step_of(model, dtype=",".join(dtypes), backend=",".join(BACKENDS)) for model in models],
        "mask ratio": [step_of(first, over="mask-ratio", batch_size=8, rounds=few)],
        "image size": [step_of(first, over="image-size", batch_size=2, rounds=few)],
        "compare": [step_of(model) for model in models],
        "autoencoders": [step_of("base", task="pretrain")],
        "kernels": [step_of(first)],
        "data": [common | {"data": config.data or ""}],
        "pretrain": [
            step_of(model, dtype=dtype, rounds=few, data=config.data or "") for model in models for dtype in dtypes
        ],
    }


def not_measured(device: torch.device) -> list[Row]:
    """Rows beside those of the throughput: the peers that can't be measured, and bfloat16 where it is slow."""
    return absent_peers() + ([] if fast_bf16(device) else [{"dtype": "bf16", "refused": SLOW_BF16}])


def fast_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16."""
    return choose_dtype("auto", device, "auto") == torch.bfloat16


@keywords_of(ReportConfig)
def report(options: dict[str, Any]) -> Path:
    """Measures, writes the folder `out` and returns the page's path.

    Raises UserError for wrong options, before anything is measured. What can't be measured here is named on the page.
    """
    config = ReportConfig(**options)
    check(config)
    out, device = Path(config.out), choose_device(config.device)
    runs = plan(config, listed("model", config.model, str, SIZES), device)
    plots.require_matplotlib()
    if config.data:
        ImageFolder(config.data)  # raises where there are no images, not at the end
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / PAGE).is_file():
            raise UserError(f"`out` {out} holds no report, and is not replaced: choose another folder")
        if not config.overwrite:
            raise UserError(f"`out` {out} is there already: give `overwrite=True` to replace it, or another folder")
        if foreign := {file.name for file in out.iterdir()} - WRITTEN:
            raise UserError(f"`out` {out} holds more than a report ({min(foreign)}): choose another folder")
    with new_folder(out) as folder:
        sections = {}
        for name in (bar := tqdm(SECTIONS, unit="part")):
            bar.set_description(name)
            bar.clear()  # the tables start on a line of their own
            sections[name] = measured(SECTIONS[name].benchmark, runs[name])
        sections["throughput"] += not_measured(device)
        write_json(folder / ROWS, {"environment": environment("report", config, device), "sections": sections})
        make_page(read_json(folder / ROWS), folder)
    print(f"report: {out / PAGE}")
    return out / PAGE


def measured(benchmark: Callable[..., list[Row]], runs: list[Options]) -> list[Row]:
    """A benchmark's rows; of what can't be measured here the reason, so that the others are not lost."""
    rows = []
    for options in runs:
        try:
            rows += benchmark(**options)
        except Exception as error:
            reason = one_line(error)
            if not isinstance(error, UserError):
                traceback.print_exc()
                reason = f"{type(error).__name__}: {reason}"
            rows.append({"refused": reason} | {k: v for k, v in options.items() if k == "model"})
    return rows


def make_page(saved: dict[str, Any], folder: Path) -> None:
    """Writes the page, its plots and the table of rows into a folder, from what the JSON file of a report holds."""
    setting, bodies = saved["environment"], {}
    for name, section in SECTIONS.items():
        rows = saved["sections"].get(name, [])
        append_csv(folder / TABLE, name, setting, rows)
        parts = []
        for file, draw in section.plots.items():
            if figure := draw(rows):
                plots.save_png(figure, folder / f"{file}.png")
                parts.append(f"<figure>{plots.as_svg(figure, file)}</figure>")
        # of the counts not each stage of a model
        shown = [row for row in rows if name != "gflops" or row.get("part", "whole") == "whole"]
        bodies[name.replace(" ", "_")] = "\n".join([*parts, make_table(shown, section.benchmark.columns)])
    template = Template(files("sparse_fcmae.benchmarks").joinpath(PAGE).read_text(encoding="utf-8"))
    page = template.substitute(
        bodies,
        machine=escape(setting["device"] if setting["device"] != "cpu" else f"{setting['cpu']}, CPU"),
        date=escape(setting["date"]),
        headlines=headlines(saved["sections"].get("throughput", [])),
        environment="".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in setting.items()),
    )
    write_atomic(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))


def make_table(rows: list[Row], columns: Columns) -> str:
    """A sortable table, without the columns that no row has, and a list of what was not measured."""
    measured, refused = [row for row in rows if not row.get("refused")], [row for row in rows if row.get("refused")]
    shown = filled(columns, measured)

    def cell(row: Row, key: str, spec: str) -> str:
        value = row.get(key)
        exact = "" if value is None else escape(str(value))
        return f'<td{" class=text" if spec == "" else ""} data-value="{exact}">{escape(as_text(value, spec))}</td>'

    parts = []
    if measured:
        titles = "".join(
            f'<th scope="col"><button{" class=text" if spec == "" else ""}>{escape(title)}</button></th>'
            for title, spec in shown.values()
        )
        lines = (f"<tr>{''.join(cell(row, key, spec) for key, (_, spec) in shown.items())}</tr>" for row in measured)
        head, body = f"<thead><tr>{titles}</tr></thead>", "\n".join(lines)
        parts.append(f'<div class="table"><table>{head}<tbody>\n{body}\n</tbody></table></div>')
    if refused:
        missing = "\n".join(f"<li>{escape(reason(row, columns))}</li>" for row in refused)
        parts.append(f'<p class="soft">Not measured:</p>\n<ul class="soft">{missing}</ul>')
    return "\n".join(parts)


def reason(row: Row, columns: Columns) -> str:
    """What was not measured, by the columns that are settings, and why."""
    known = [column for column in columns.items() if row.get(column[0]) is not None and "." not in column[1][1]]
    place = ", ".join(row[key] if spec == "" else f"{title} {row[key]}" for key, (title, spec) in known)
    return f"{place}: {row['refused']}" if place else row["refused"]


def headlines(rows: list[Row]) -> str:
    """List items with the figures that one looks for first, where they were measured."""
    items = []
    for row in rows:
        if (row.get("work"), row.get("candidate")) != ("step", "native"):
            continue
        where = f"{row['model']}, {row['dtype']}"
        for key, what in (("speedup", "dense convolution with a mask"), ("over_minkowski", "MinkowskiEngine")):
            if row.get(key):
                text = escape(f"a training step of the encoder over {what}, {where}")
                items.append(f"<li><b>{row[key]:.1f} times</b>{text}</li>")
    return "".join(items)
