"""Rows of the benchmarks as pictures. Needs matplotlib.

A function that draws takes rows and returns None where they have nothing for it to draw.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind too
    "native": "#0072b2",
    "torch": "#56b4e9",
    "masked": "#999999",
    "masked, once behind the stem": "#cc79a7",
    "minkowski": "#e69f00",
    "dense": "#999999",
    "sparse": "#0072b2",
    "sparse-fcmae": "#0072b2",
    "matrix products": "#009e73",
}
SPARE_COLOURS = ("#d55e00", "#cc79a7", "#e69f00", "#009e73", "#56b4e9", "#f0e442", "#0072b2", "#999999")
MOST_BARS = 24  # next to each other
LABELS = {"mask-ratio": "fraction of the patches that is masked", "image-size": "side of the image, pixels"}


def require_matplotlib() -> None:
    """Raises UserError where there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'sparse-fcmae[plots]'") from None


def new_figure(width: float = 7, lines: int = 1) -> tuple["Figure", list["Axes"]]:
    """An empty figure, so many inches wide, of so many axes below each other that share the scale upwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6 * lines), layout="constrained")
    all_axes = figure.subplots(lines, squeeze=False, sharey=True)[:, 0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    return figure, list(all_axes)


def draw_bars(
    rows: list[Row],
    value: str,
    ylabel: str,
    *,
    group: Callable[[Row], str],
    bar: Callable[[Row], str] = lambda row: row["candidate"],
    spec: str = ".1f",
    log: bool = False,
) -> "Figure | None":
    """The rows that have a value as labelled bars, in groups, not too many next to each other.

    group, bar: the names of a row's.
    """
    from matplotlib.patches import Patch

    rows = [row for row in rows if row.get(value) is not None]
    if not rows:
        return None
    colours = colours_of(dict.fromkeys(map(bar, rows)))
    groups = list(dict.fromkeys(map(group, rows)))
    lines = min(-(-len(rows) // MOST_BARS), len(groups))
    a_line = -(-len(groups) // lines)
    figure, all_axes = new_figure(max(7, 1 + (0.42 * len(rows) + 0.4 * len(groups)) / lines), lines)
    for axes, first in zip(all_axes, range(0, len(groups), a_line), strict=False):
        left, ticks = 0.0, []
        for name in groups[first : first + a_line]:
            own = {bar(row): row[value] for row in rows if group(row) == name}
            places = [left + i for i in range(len(own))]
            drawn = axes.bar(places, own.values(), width=0.9, color=[colours[label] for label in own])
            axes.bar_label(drawn, fmt=lambda v: format(v, spec), fontsize=7, padding=1)
            ticks.append(left + (len(own) - 1) / 2)
            left += len(own) + 0.8
        axes.set_xticks(ticks, groups[first : first + a_line], fontsize=8)
        axes.set(ylabel=ylabel, yscale="log" if log else "linear")
        axes.margins(x=0.01, y=0.12)
    for axes in all_axes[-(-len(groups) // a_line) :]:
        axes.remove()
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper left", fontsize=8, frameon=False, ncols=5)
    return figure


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each candidate, in which a backend's variants are as the backend."""
    spare = cycle(SPARE_COLOURS)
    return {name: COLOURS.get(name) or COLOURS.get(name.split(", ")[0]) or next(spare) for name in names}


def draw_gflops(rows: list[Row]) -> "Figure | None":
    """The encoder dense and sparse, of each model at the first image size."""
    whole = [row for row in rows if "sparse_encoder_gmacs" in row and row["part"] == "whole"]
    bars = [
        {"model": row["model"], "candidate": kind, "gmacs": row[key]}
        for row in whole
        if row["image_size"] == whole[0]["image_size"]
        for kind, key in (("dense", "encoder_gmacs"), ("sparse", "sparse_encoder_gmacs"))
    ]
    ylabel = "G multiply-accumulates of the encoder"
    return draw_bars(bars, "gmacs", ylabel, group=lambda row: row["model"], spec=".3g", log=True)


# a figure of each backend
draw_backends = partial(draw_bars, group=lambda row: f"{row['model']} {row['dtype']}\n{row['work']}")
draw_speedups = partial(draw_backends, value="speedup", ylabel="images/s over masked")
draw_limits = partial(draw_backends, value="over_limit", ylabel="time over that of the products", spec=".2f")
draw_memory = partial(draw_backends, value="peak_mb", ylabel="peak memory, MB", spec=".0f")
draw_speeds = partial(
    draw_bars,
    value="images_per_second",
    ylabel="images/s",
    group=lambda row: f"{row.get('model', '')} {row.get('dtype', '')}".strip(),
)
draw_bounds = partial(
    draw_bars,
    value="of_bound",
    ylabel="bound / measured",
    group=lambda row: row["op"],
    bar=lambda row: f"{row['features']} {row['pass']}",
    spec=".2f",
)


def draw_parts(rows: list[Row]) -> "Figure | None":
    """A run from files, beside its step and the ideal. Decoding alone is so fast that it would dwarf them."""
    parts = [row for row in rows if row.get("part") != "decoding"]
    name = "{model} {dtype}, {batch_size} images".format_map
    return draw_bars(parts, "images_per_second", "images/s", group=name, bar=lambda row: row["part"])


def draw_scaling(rows: list[Row]) -> "Figure | None":
    """Milliseconds an image over what varies, and the ideal lines."""
    rows = [row for row in rows if "ms" in row]
    if not rows:
        return None
    over, (figure, (axes,)) = rows[0]["over"], new_figure()
    values = list(dict.fromkeys(str(row["value"]) for row in rows))
    numeric = over != "model" and not any("x" in value for value in values)
    for name, colour in colours_of(dict.fromkeys(row["candidate"] for row in rows)).items():
        own = [row for row in rows if row["candidate"] == name]
        x = [float(row["value"]) if numeric else str(row["value"]) for row in own]
        axes.plot(x, [row["ms"] / row["batch_size"] for row in own], marker=".", label=name, color=colour)
        if "ideal_ms" in own[0]:
            ideal = [row["ideal_ms"] / row["batch_size"] for row in own]
            axes.plot(x, ideal, linestyle="--", linewidth=1, label=f"{name}, ideal", color=colour)
    axes.set(xlabel=LABELS.get(over, over), ylabel="ms an image, forward and backward")
    if numeric and over != "mask-ratio":
        axes.set(xscale="log", yscale="log")
        axes.set_xticks([float(v) for v in values], values)
        axes.minorticks_off()
    else:
        axes.set_ylim(0)
    axes.legend(fontsize=8, frameon=False)
    return figure


def draw_ablations(rows: list[Row]) -> "Figure | None":
    """Nearest neighbours over the epochs, the mean over the seeds; and what each seed's run has learnt in the end."""
    from matplotlib.figure import Figure

    if not rows:
        return None
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    labels = sorted({row["labels"] for row in rows if row.get("labels")})
    measures = [("k-NN, all labels", "knn", None), ("linear probe, all labels", "linear", None)]
    measures += [(f"fine-tuned, {count} labels a class", "tuned", count) for count in labels]
    figure = Figure(figsize=(4 + 2.6 * len(measures), 3.6), layout="constrained")
    curves, *panels = figure.subplots(1, 1 + len(measures), width_ratios=[1.5] + [1] * len(measures))
    for variant, colour in colours_of(variants).items():
        own = [row for row in rows if row["variant"] == variant]
        if len(own[0]["curve"]) > 2:  # before and after is no curve
            epochs = [epoch for epoch, _ in own[0]["curve"]]
            points = zip(*([top1 for _, top1 in row["curve"]] for row in own), strict=True)
            means = [100 * sum(point) / len(point) for point in points]
            curves.plot(epochs, means, marker=".", label=variant, color=colour)
        for axes, (_, measure, count) in zip(panels, measures, strict=True):
            found = {row["seed"]: row[measure] for row in own if count in (None, row.get("labels"))}
            place = -variants.index(variant)
            axes.plot([100 * value for value in found.values()], [place] * len(found), "o", color=colour, alpha=0.6)
            if found:
                axes.plot([100 * sum(found.values()) / len(found)], [place], "|", color="black", markersize=14)
    curves.set(xlabel="epoch", ylabel="k-NN, top-1 %")
    curves.legend(fontsize=7, frameon=False)
    for axes, (title, _, _) in zip(panels, measures, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("top-1 %")
        axes.set_yticks([-i for i in range(len(variants))], variants if axes is panels[0] else [""] * len(variants))
        axes.grid(axis="x", alpha=0.3)
    for axes in (curves, *panels):
        axes.spines[["top", "right"]].set_visible(False)
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
