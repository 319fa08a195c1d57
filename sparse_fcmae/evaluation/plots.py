"""Classes as pictures: a confusion matrix, and maps of an image. What is named draw_ needs matplotlib."""

import colorsys
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic

STRONGEST = 0.65  # share of a certain class's colour in a pixel of a map
IN_LEGEND = 20  # classes


def check_installed(option: str, module: str, package: str, extra: str) -> None:
    """Raises UserError where what an option needs is not installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"`{option}` needs {module}: pip install {package} (the extra {extra})")


def plain(text: str) -> str:
    """A text that matplotlib shows as it is, and not as a formula."""
    return text.replace("$", r"\$")


def draw_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    path: Path,
    *,
    floor: float | None = None,
    log: bool = False,
) -> None:
    """Writes a PNG of curves by their names, each of x and y. floor: where the axis of y begins. log: its scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker="." if len(x) < 50 else None, label=plain(name))
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    if floor is not None:
        axes.set_ylim(bottom=floor)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))


def draw_confusion(confusion: dict[str, Any], path: Path) -> None:
    """Writes a PNG of how many percent of each true class's images were taken for each class.

    confusion: as `accuracy` gives it, the names of the classes and counts [true, predicted].
    """
    from matplotlib.figure import Figure

    classes, counts = [plain(name) for name in confusion["classes"]], np.array(confusion["counts"], dtype=float)
    fractions = counts / counts.sum(1, keepdims=True).clip(1)
    side = min(12, max(4, 0.35 * len(classes)))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(100 * fractions, cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for (row, column), fraction in np.ndenumerate(fractions):
            if fraction >= 0.005:
                colour = "white" if fraction > 0.5 else "black"
                axes.text(column, row, f"{100 * fraction:.0f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(picture, label="% of the true class")
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))


def draw_class_map(
    picture: np.ndarray, boxes: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], name: str, path: Path
) -> None:
    """Writes a PNG of an image, uint8 [H, W, 3], beside what `class_overlay` makes of it, with a legend."""
    colours = colours_of(len(classes))
    overlay = class_overlay(picture, boxes, probabilities, colours)
    _draw_beside(picture, overlay, probabilities.argmax(1), colours, classes, "windows", name, path)


def draw_pixel_map(picture: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str, path: Path) -> None:
    """Writes a PNG of an image, uint8 [H, W, 3], beside itself in the colours of its pixels' classes, [H, W]."""
    colours = colours_of(len(classes))
    _draw_beside(picture, overlaid(picture, labels, colours), labels.ravel(), colours, classes, "pixels", name, path)


def _draw_beside(
    picture: np.ndarray,
    overlay: np.ndarray,
    labels: np.ndarray,
    colours: np.ndarray,
    classes: Sequence[str],
    what: str,
    name: str,
    path: Path,
) -> None:
    """Writes a PNG of two pictures beside each other, with a legend. labels: the classes of all that is coloured."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = picture.shape[:2]
    figure = Figure(figsize=(14, 7 * height / width + 1), layout="constrained")
    for axes, pixels in zip(figure.subplots(1, 2), (picture, overlay), strict=True):
        axes.imshow(pixels)
        axes.set_axis_off()
    counts = np.bincount(labels, minlength=len(classes))
    percent = (100 * counts / len(labels)).round().astype(int)
    patches = [
        Patch(color=colours[label], label=f"{plain(classes[label])}: {percent[label]} % of the {what}")
        for label in counts.argsort(kind="stable")[::-1][:IN_LEGEND]
        if counts[label]
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(4, len(patches)), frameon=False)
    figure.suptitle(plain(name))
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=100))


def colours_of(classes: int) -> np.ndarray:
    """A colour for each class, float [K, 3] between 0 and 1. The hues of neighbours are far apart."""
    golden = (5**0.5 - 1) / 2
    return np.array([colorsys.hsv_to_rgb((0.6 + golden * label) % 1, 0.75, 0.95) for label in range(classes)])


def overlaid(picture: np.ndarray, labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], in the colours of its pixels' classes, uint8; grey where the label is negative."""
    coloured = np.where(labels[..., None] < 0, 0.5, colours[labels.clip(0)])
    return ((1 - STRONGEST) * picture + STRONGEST * 255 * coloured).round().astype(np.uint8)


def class_overlay(picture: np.ndarray, boxes: np.ndarray, probabilities: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A picture, uint8 [H, W, 3], with the classes of its windows in colour: values between 0 and 1, [H, W, 3].

    boxes: left, top, right and bottom of each window, in pixels of the picture, [N, 4], on a grid. probabilities:
    [N, K]. colours: of the classes, [K, 3]. A pixel has the colour of the window whose middle is nearest, the stronger
    the more probable its class is.
    """
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    across, down = np.unique(middles[:, 0]), np.unique(middles[:, 1])
    columns = np.abs(np.arange(picture.shape[1])[:, None] + 0.5 - across).argmin(1)
    rows = np.abs(np.arange(picture.shape[0])[:, None] + 0.5 - down).argmin(1)
    window_at = np.lexsort((middles[:, 0], middles[:, 1])).reshape(len(down), len(across))
    of_pixel = window_at[rows[:, None], columns]
    alpha = STRONGEST * probabilities.max(1)[of_pixel][..., None]
    return ((1 - alpha) * picture / 255 + alpha * colours[probabilities.argmax(1)][of_pixel]).clip(0, 1)
