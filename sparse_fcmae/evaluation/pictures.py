"""Images as people look at them: values that can be shown, and histograms of values."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_fcmae.data.format import BYTE, ImageFormat
from sparse_fcmae.runtime.files import write_atomic

SHOWN = (0.01, 0.99)  # quantiles of a channel that are shown as black and as white
BINS, PANELS = 100, 16  # of a histogram, and channels that have one


def shown(form: ImageFormat, images: Tensor, originals: Tensor) -> Tensor:
    """Normalised images [N, C, H, W] as values between 0 and 1.

    Photographs are as they are. Others lie between the quantiles SHOWN of each channel of `originals`, [M, C, H, W].
    """
    if form.is_photograph:
        return form.restore(images) / BYTE
    low, high = np.quantile(originals.cpu().numpy(), SHOWN, axis=(0, 2, 3), keepdims=True)
    low, high = (torch.tensor(limit[0], dtype=images.dtype, device=images.device) for limit in (low, high))
    return (images - low) / (high - low).clamp_min(1e-6)


def rgb(images: Tensor, channels: Sequence[int] = ()) -> np.ndarray:
    """Values between 0 and 1 [N, C, H, W] as uint8 [N, H, W, 3].

    channels: which to show, counted from 0; the first three where none are named. Three are red, green and blue, two
    are green and magenta, and one is grey.
    """
    chosen = images[:, list(channels)] if channels else images[:, :3]
    places = {1: (0, 0, 0), 2: (1, 0, 1), 3: (0, 1, 2)}[chosen.shape[1]]
    colour = chosen[:, list(places)]
    return (255 * colour.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def draw_histograms(columns: np.ndarray, form: ImageFormat, path: Path) -> None:
    """Writes a PNG of how often each value occurs in each of the first PANELS channels. Needs matplotlib.

    columns: values [C, N], of which those that are not finite are left out. The mean is marked, and one deviation to
    either side of it is grey, as a line below the panels says.
    """
    from matplotlib.figure import Figure

    count = min(len(columns), PANELS)
    across = min(count, 4)
    down = -(-count // across)
    figure = Figure(figsize=(4 * across, 2.6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for number, axes in enumerate(panels):
        if number >= count:
            axes.set_axis_off()
            continue
        values = columns[number][np.isfinite(columns[number])].astype(np.float64)
        axes.hist(values, BINS, color="tab:blue")
        axes.set_yscale("log")
        axes.axvline(form.mean[number], color="black")
        axes.axvspan(form.mean[number] - form.std[number], form.mean[number] + form.std[number], color="0.9", zorder=0)
        channel = (form.channels or range(1, count + 1))[number]
        axes.set_title(f"channel {channel}: {form.mean[number]:.4g} ± {form.std[number]:.3g}", fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("value; black line: mean, grey: one deviation to either side", fontsize=8)
    figure.supylabel("how often, of the values measured", fontsize=8)
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=100))
