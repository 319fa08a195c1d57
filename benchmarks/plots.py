"""Rows of the benchmarks as pictures. Needs matplotlib."""

import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind too
    **{"native": "#0072b2", "torch": "#56b4e9", "masked": "#999999", "minkowski": "#e69f00"},
    **{"dense": "#999999", "sparse": "#0072b2", "sparse-fcmae": "#0072b2", "matrix products": "#009e73"},
}
SPARE_COLOURS = ("#d55e00", "#cc79a7", "#e69f00", "#009e73", "#56b4e9", "#f0e442")
LABELS = {
    "mask-ratio": "share of the patches that is masked",
    "image-size": "side of the image, pixels",
    "batch-size": "images a step",
    "threads": "threads",
    "model": "model",
}


def require_matplotlib() -> None:
    """Raises UserError where there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'sparse-fcmae[plots]'") from None


def new_figure(width: float = 7, height: float = 3.6) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def bars(groups: dict[str, dict[str, float]], ylabel: str, spec: str = ".1f", log: bool = False) -> "Figure":
    """Groups of labelled bars: group -> candidate -> value."""
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = new_figure(width=max(7, 1 + 0.42 * sum(map(len, groups.values())) + 0.4 * len(groups)))
    left, ticks = 0.0, []
    for group in groups.values():
        for i, (name, value) in enumerate(group.items()):
            bar = axes.bar(left + i, value, width=0.9, color=colour(name, names))
            axes.bar_label(bar, fmt=lambda v: format(v, spec), fontsize=7, padding=1)
        ticks.append(left + (len(group) - 1) / 2)
        left += len(group) + 0.8
    axes.set_xticks(ticks, list(groups), fontsize=8)
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    handles = [Patch(color=colour(name, names), label=name) for name in names]
    figure.legend(handles=handles, loc="outside upper left", fontsize=8, frameon=False, ncols=5)
    axes.margins(x=0.01, y=0.12)
    return figure


def colour(name: str, names: list[str]) -> str:
    """A candidate's colour."""
    known = {n: COLOURS[n.split(", ")[0]] for n in names if n.split(", ")[0] in COLOURS}
    others = [n for n in names if n not in known]
    return known.get(name) or SPARE_COLOURS[others.index(name) % len(SPARE_COLOURS)]


def draw_gflops(rows: list[Row]) -> "Figure":
    """Encoder dense and sparse, of each model at the first image size."""
    whole = [row for row in rows if "sparse_encoder_gmacs" in row and row["part"] == "whole"]
    groups = {
        row["model"]: {"dense": row["encoder_gmacs"], "sparse": row["sparse_encoder_gmacs"]}
        for row in whole
        if row["image_size"] == whole[0]["image_size"]
    }
    return bars(groups, "G multiply-accumulates of the encoder", ".3g", log=True)


def draw_throughput(rows: list[Row], key: str, ylabel: str, spec: str = ".1f") -> "Figure":
    """A figure of each backend, grouped by model, dtype and kind of work."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get(key) is not None:
            where = f"{row['model']} {row['dtype']}\n{row['work']}"
            groups.setdefault(where, {})[row["candidate"]] = row[key]
    return bars(groups, ylabel, spec)


def draw_scaling(rows: list[Row]) -> "Figure":
    """Milliseconds an image over what varies, and the ideal lines."""
    over = rows[0]["over"]
    rows = [row for row in rows if "ms" in row]
    figure, axes = new_figure()
    values = list(dict.fromkeys(str(row["value"]) for row in rows))
    numeric = over in ("mask-ratio", "threads", "batch-size") or all("x" not in v and over != "model" for v in values)
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    for name in names:
        mine = [row for row in rows if row["candidate"] == name]
        x = [float(row["value"]) if numeric else str(row["value"]) for row in mine]
        axes.plot(
            x, [1e3 / row["images_per_second"] for row in mine], marker=".", color=colour(name, names), label=name
        )
        if "ideal_ms" in mine[0]:
            ideal = [row["ideal_ms"] / row["ms"] * 1e3 / row["images_per_second"] for row in mine]
            axes.plot(x, ideal, linestyle="--", linewidth=1, color=colour(name, names), label=f"{name}, ideal")
    axes.set(xlabel=LABELS[over], ylabel="ms an image, forward and backward")
    if numeric and over != "mask-ratio":
        axes.set(xscale="log", yscale="log")
        axes.set_xticks([float(v) for v in values], values)
        axes.minorticks_off()
    else:
        axes.set_ylim(0)
    axes.legend(fontsize=8, frameon=False)
    return figure


def draw_speeds(rows: Iterable[Row], group: str = "") -> "Figure":
    """Images a second of each candidate, grouped by a column."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if "images_per_second" in row:
            groups.setdefault(row.get(group, ""), {})[row["candidate"]] = row["images_per_second"]
    return bars(groups, "images/s")


def draw_bounds(rows: list[Row]) -> "Figure":
    """The share of the machine's bound that each op reaches, by stage and pass."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if "of_bound" in row:
            groups.setdefault(row["op"], {})[f"{row['features']} {row['pass']}"] = row["of_bound"]
    figure, axes = new_figure(width=max(6, 0.3 * sum(map(len, groups.values()))))
    left, ticks, labels = 0, [], []
    for op, group in groups.items():
        axes.bar(range(left, left + len(group)), list(group.values()), label=op)
        ticks += range(left, left + len(group))
        labels += list(group)
        left += len(group) + 1
    axes.set_xticks(ticks, labels, rotation=90, fontsize=6)
    axes.set(ylabel="bound / measured", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False, ncols=4)
    return figure


def save_png(figure: "Figure", path: Path) -> None:
    """Writes a PNG, atomically."""
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))


def as_svg(figure: "Figure", title: str) -> str:
    """An <svg> element to stand in a page, its texts as texts, its names its own."""
    import matplotlib

    buffer = StringIO()
    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    text = buffer.getvalue()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{title}-", text[text.index("<svg") :])
    legible = f"min-width: {60 * figure.get_figwidth():.0f}px"
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" style="{legible}" ', 1)
