"""The whole suite on this machine: one HTML page that needs nothing else, plots as PNG, rows as JSON and CSV."""

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks import compare, gflops, kernels, plots, scaling, throughput
from sparse_fcmae.benchmarks import data as loading
from sparse_fcmae.benchmarks.results import Columns, Row, append_csv, as_text, check_numbers, environment
from sparse_fcmae.config import ReportConfig, listed
from sparse_fcmae.data import ImageFolder
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import new_folder, one_line, write_atomic, write_json
from sparse_fcmae.training.distributed import choose_device, choose_dtype

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, ROWS, TABLE = "report.html", "rows.json", "rows.csv"
BATCHES = {"atto": 32, "femto": 32, "pico": 16, "nano": 16, "tiny": 8, "base": 4, "large": 2, "huge": 1}  # on a CPU
GPU_SCALE = 16  # times as many on a GPU
SLOW_BF16 = "this machine has no instructions for it, so that it is slower than fp32"


@dataclass
class Section:
    """A part of the page: `measure` gives its rows, `draw` a plot of them by name. Parts of a model are not shown."""

    name: str
    title: str
    text: str
    columns: Columns
    measure: Callable[[], list[Row]]
    draw: dict[str, Callable[[list[Row]], "Figure"]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def report(**options: Any) -> Path:
    """Measures, writes the folder --out and returns the page's path; options are those of `ReportConfig`."""
    config = ReportConfig(**options)
    out, device = Path(config.out), choose_device(config.device)
    models = listed("model", config.model, str, SIZES)
    check_numbers(config)
    plots.require_matplotlib()
    if config.data:
        ImageFolder(config.data)  # raises where there are no images, not at the end
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / PAGE).is_file():
            raise UserError(f"--out {out} holds no report, and is not replaced: choose another folder")
        if not config.overwrite:
            raise UserError(f"--out {out} is there already: give --overwrite to replace it, or another folder")
    with new_folder(out) as folder:
        parts = sections(config, models, device)
        for section in (bar := tqdm(parts, unit="part")):
            bar.set_description(section.name)
            bar.clear()  # the tables start on a line of their own
            section.rows = measured(section)
        setting = environment("report", config, device)
        write_json(folder / ROWS, {"environment": setting, "sections": {s.name: s.rows for s in parts}})
        for section in parts:
            append_csv(folder / TABLE, {"benchmark": section.name, "environment": setting, "rows": section.rows})
        page = make_page(parts, setting, folder)
        write_atomic(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    print(f"report: {out / PAGE}")
    return out / PAGE


def sections(config: ReportConfig, models: list[str], device: torch.device) -> list[Section]:
    """What is measured, in the page's order."""
    gpu = device.type == "cuda"
    common = {"rounds": config.rounds, "seed": config.seed, "device": config.device}
    batches = {model: batch_of(model, gpu) for model in models}
    scaled = {"model": models[0], "rounds": min(3, config.rounds), **{k: common[k] for k in ("seed", "device")}}

    def over_models(measure: Callable[..., list[Row]], **options: Any) -> list[Row]:
        return [row for model in models for row in measure(model=model, batch_size=batches[model], **common, **options)]

    def backends() -> list[Row]:
        fast = choose_dtype("auto", device, "auto") == torch.bfloat16
        rows = over_models(throughput.throughput, dtype="fp32,bf16" if fast else "fp32", backend=",".join(BACKENDS))
        return rows + throughput.absent_peers() + ([] if fast else [{"dtype": "bf16", "refused": SLOW_BF16}])

    def speed(rows: list[Row]) -> "Figure":
        return plots.draw_throughput(rows, "speedup", f"images/s over {throughput.BASELINE}")

    def memory(rows: list[Row]) -> "Figure":
        return plots.draw_throughput(rows, "peak_mb", "peak memory, MB", ".0f")

    parts = [
        Section(
            "gflops",
            "What a forward pass costs",
            "Multiply-accumulates of one image. Sparse is the mean over random masks; taps on masked positions are not "
            "done and not counted. The published figures are those of the official repository; each stage's are in "
            f"{TABLE}.",
            gflops.COLUMNS,
            lambda: gflops.gflops(),
            {"gflops": plots.draw_gflops},
        ),
        Section(
            "throughput",
            "Backend against backend",
            "Forward: features alone. Step: and the gradients. Pretrain: a whole step with decoder and optimiser. The "
            "backend masked is dense convolution with the mask multiplied in, torch gathers the visible positions in "
            "plain PyTorch, minkowski is MinkowskiEngine, in float32 only. Each gave the same features and gradients "
            "before it was timed.",
            throughput.COLUMNS,
            backends,
            {"throughput": speed, "memory": memory},
        ),
        Section(
            "mask ratio",
            "As more is masked",
            "A training step of the encoder. The ideal line falls with the multiply-accumulates of what is visible.",
            scaling.COLUMNS,
            lambda: scaling.scaling(over="mask-ratio", **scaled),
            {"scaling-mask-ratio": plots.draw_scaling},
        ),
        Section(
            "image size",
            "As images grow",
            "A training step of the encoder, 60 % masked, two images at once.",
            scaling.COLUMNS,
            lambda: scaling.scaling(over="image-size", batch_size=2, **scaled),
            {"scaling-image-size": plots.draw_scaling},
        ),
        Section(
            "compare",
            "Instead of what",
            "Whole training steps of the models that other libraries offer, on the same images: fine-tuning, dense.",
            compare.COLUMNS,
            lambda: over_models(compare.compare),
            {"compare": lambda rows: plots.draw_speeds(rows, "model")},
        ),
        Section(
            "autoencoders",
            "Another masked autoencoder",
            "A whole pretraining step beside that of a vision transformer's masked autoencoder, each as published.",
            compare.COLUMNS,
            lambda: compare.compare(task="pretrain", model="base", batch_size=batch_of("base", gpu), **common),
            {"autoencoders": lambda rows: plots.draw_speeds(rows, "model")},
        ),
        Section(
            "kernels",
            "Kernels against the machine",
            "Each op over its reference in plain PyTorch, and the share of its bound that it reaches.",
            kernels.COLUMNS,
            lambda: kernels.kernels(model=models[0], batch_size=batches[models[0]], **common),
            {} if gpu else {"kernels": plots.draw_bounds},
        ),
    ]
    if config.data:
        rounds, seed = common["rounds"], common["seed"]
        parts.append(
            Section(
                "data",
                "Loading",
                "Images decoded, cropped, flipped and normalised by one core.",
                loading.COLUMNS,
                lambda: loading.data(data=config.data, rounds=rounds, seed=seed),
                {"data": plots.draw_speeds},
            )
        )
    return parts


def batch_of(model: str, gpu: bool) -> int:
    """Images a step, few enough for a usual machine."""
    return BATCHES[model] * (GPU_SCALE if gpu else 1)


def measured(section: Section) -> list[Row]:
    """A section's rows; the reason where it can't be measured here, so that the others are not lost."""
    try:
        return section.measure()
    except Exception as error:
        return [{"refused": one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"}]


def make_page(parts: list[Section], setting: Row, folder: Path) -> str:
    """The page; its plots are written into `folder` too."""
    template = Template(files("sparse_fcmae.benchmarks").joinpath(PAGE).read_text(encoding="utf-8"))
    bodies = []
    for section in parts:
        pictures = []
        if not all(row.get("refused") for row in section.rows):
            for name, draw in section.draw.items():
                figure = draw(section.rows)
                plots.save_png(figure, folder / f"{name}.png")
                pictures.append(f"<figure>{plots.as_svg(figure, name)}</figure>")
        rows = [row for row in section.rows if row.get("part", "whole") == "whole"]
        heading = f'<h2 id="{anchor(section)}">{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>'
        bodies.append("\n".join([heading, *pictures, make_table(rows, section.columns)]))
    return template.substitute(
        machine=escape(setting["device"] if setting["device"] != "cpu" else f"{setting['cpu']}, CPU"),
        date=escape(setting["date"]),
        headlines="".join(f"<li><b>{value}</b>{escape(text)}</li>" for value, text in headlines(parts)),
        contents="".join(f'<a href="#{anchor(s)}">{escape(s.title)}</a>' for s in parts),
        sections="\n".join(bodies),
        environment="".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in setting.items()),
    )


def anchor(section: Section) -> str:
    return section.name.replace(" ", "-")


def make_table(rows: list[Row], columns: Columns) -> str:
    """A sortable table, without the columns that no row has, and a list of what was not measured."""
    measured, refused = [row for row in rows if not row.get("refused")], [row for row in rows if row.get("refused")]
    kept = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in measured)}

    def cell(row: Row, key: str, spec: str) -> str:
        value = row.get(key)
        exact = "" if value is None else escape(str(value))
        return f'<td{" class=text" if spec == "" else ""} data-value="{exact}">{escape(as_text(value, spec))}</td>'

    titles = "".join(
        f'<th scope="col"><button{" class=text" if spec == "" else ""}>{escape(title)}</button></th>'
        for title, spec in kept.values()
    )
    lines = (f"<tr>{''.join(cell(row, key, spec) for key, (_, spec) in kept.items())}</tr>" for row in measured)
    body, missing = "\n".join(lines), "\n".join(f"<li>{escape(reason(row, columns))}</li>" for row in refused)
    parts = []
    if measured:
        parts.append(
            f'<div class="table"><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        )
    if refused:
        parts.append(f'<p class="soft">Not measured:</p>\n<ul class="soft">{missing}</ul>')
    return "\n".join(parts)


def reason(row: Row, columns: Columns) -> str:
    """What was not measured, by the columns that are settings, and why."""
    known = [column for column in columns.items() if row.get(column[0]) is not None and "." not in column[1][1]]
    place = ", ".join(row[key] if spec == "" else f"{title} {row[key]}" for key, (title, spec) in known)
    return f"{place}: {row['refused']}" if place else row["refused"]


def headlines(parts: list[Section]) -> list[tuple[str, str]]:
    """The figures that one looks for first, where they were measured."""
    found = []
    rows = next(section.rows for section in parts if section.name == "throughput")
    for row in rows:
        if (row.get("work"), row.get("candidate")) != ("step", "native"):
            continue
        where = f"{row['model']}, {row['dtype']}"
        for key, what in (("speedup", "dense convolution with a mask"), ("over_minkowski", "MinkowskiEngine")):
            if row.get(key):
                found.append((f"{row[key]:.1f} times", f"a training step of the encoder over {what}, {where}"))
    return found
