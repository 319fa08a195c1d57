"""A confusion matrix as a picture. Needs matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from sparse_fcmae.runtime.files import write_atomic


def draw_confusion(confusion: dict[str, Any], path: Path) -> None:
    """Writes a PNG of how many percent of each true class's images were taken for each class.

    confusion: as `accuracy` gives it, the names of the classes and counts [true, predicted].
    """
    from matplotlib.figure import Figure

    classes, counts = confusion["classes"], np.array(confusion["counts"], dtype=float)
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
