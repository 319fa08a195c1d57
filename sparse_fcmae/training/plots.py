"""Curves of a training run as pictures. Needs matplotlib."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparse_fcmae.runtime.files import write_atomic


def draw_loss(run: Path, label: str, held_out: str) -> None:
    """Writes RUN/loss.png: the loss of each step, its mean over each epoch, and that on held-out images.

    label: of the axis. held_out: the name of the loss in evaluations.jsonl, where it is measured.
    """
    rows, evaluations = _rows(run / "metrics.jsonl"), _rows(run / "evaluations.jsonl")
    epochs = np.array([row["epoch"] for row in rows])
    losses = np.array([row["loss"] for row in rows], dtype=float)  # NaN for null, where a step was skipped
    epoch_of = np.ceil(epochs - 1e-6).astype(int)
    known = np.isfinite(losses)
    whole = np.unique(epoch_of[known])
    figure, axes = _axes(xlabel="epoch", ylabel=label, xlim=(0, epochs[-1]))
    axes.plot(epochs, losses, color="0.75", linewidth=1, label="step")
    means = [losses[known & (epoch_of == epoch)].mean() for epoch in whole]
    axes.plot(whole - 0.5, means, color="tab:blue", marker=".", label="mean of the epoch")
    for name, style in ((held_out, "-"), (f"ema_{held_out}", "--")):
        if found := [(row["epoch"], row[name]) for row in evaluations if name in row]:
            text = "held-out images" + (", moving average" if name != held_out else "")
            axes.plot(*np.array(found, dtype=float).T, color="tab:orange", marker=".", linestyle=style, label=text)
    _write(figure, axes, run / "loss.png")


def draw_lr_range(path: Path, rates: np.ndarray, losses: np.ndarray, smooth: np.ndarray, chosen: float) -> None:
    """Writes a PNG of a range test: losses and their moving average over the learning rate, and the rate to try."""
    figure, axes = _axes(xlabel="learning rate", ylabel="loss", xscale="log")
    axes.plot(rates, losses, color="0.75", linewidth=1, label="step")
    axes.plot(rates, smooth, color="tab:blue", label="moving average")
    axes.axvline(chosen, color="tab:orange", linestyle="--", label=f"falls fastest: {chosen:.2g}")
    low, high = float(smooth.min()), float(smooth[0])
    axes.set_ylim(low - 0.2 * (high - low) - 1e-3, high + (high - low) + 1e-3)  # the end of the test may be anywhere
    _write(figure, axes, path)


def draw_evaluations(evaluations: Path, value: str, shown: str, path: Path) -> None:
    """Writes a PNG of a value measured over the epochs, from evaluations.jsonl. shown: what the axis calls it."""
    rows = _rows(evaluations)
    figure, axes = _axes(xlabel="epoch", ylabel=f"{shown} on held-out images, %")
    for name, label in ((value, "weights"), (f"ema_{value}", "their moving average")):
        if name in rows[-1]:
            axes.plot([row["epoch"] for row in rows], [100 * row[name] for row in rows], marker=".", label=label)
    _write(figure, axes, path)


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _axes(**settings: Any) -> tuple[Any, Any]:
    """A new figure, and its axes with these settings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set(**settings)
    axes.grid(alpha=0.3)
    return figure, axes


def _write(figure: Any, axes: Any, path: Path) -> None:
    axes.legend()
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))
