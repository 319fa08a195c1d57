"""Pictures of what a run has learnt: reconstructions as a grid, the loss as a curve."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sparse_fcmae.data import ImageFolder, channel_stats, load_crop, normalise
from sparse_fcmae.fcmae import FCMAE, TARGET_EPS, patchify, unpatchify
from sparse_fcmae.files import write_atomic

GAP, LABEL = 4, 14  # pixels
GREY = 0.5


def sample_images(folder: ImageFolder, count: int, size: tuple[int, int], in_chans: int) -> Tensor:
    """Centred crops of up to `count` images spread over the folder: uint8 [N, H, W, C], less unreadable ones."""
    crops = []
    for index in np.unique(np.linspace(0, len(folder) - 1, count).astype(int)):
        with contextlib.suppress(Exception), folder.open(index) as image:  # training names it in the log
            crops.append(load_crop(image, size, in_chans))
    return torch.from_numpy(np.stack(crops)) if crops else torch.empty(0, *size, in_chans, dtype=torch.uint8)


@torch.no_grad()
def reconstruct(model: FCMAE, pixels: Tensor, generator: torch.Generator) -> Image.Image:
    """A row an image: original, masked, and the prediction pasted into the visible pixels.

    pixels: uint8 [N, H, W, C] on the model's device. Where targets are normalised, the prediction gets the mean and
    variance of the true patch back, as only its pattern is learnt.
    """
    images = normalise(pixels)
    output = model(images, generator=generator)
    patches = patchify(images, model.patch_size)
    predicted = output.prediction.float()
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + TARGET_EPS).sqrt() + mean
    hidden = output.mask.flatten(1)[..., None]
    grid = output.mask.shape[1:]
    pasted = unpatchify(torch.where(hidden, predicted, patches), model.patch_size, grid)
    hidden = unpatchify(hidden.expand_as(patches), model.patch_size, grid)
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in channel_stats(images.shape[1]))
    original, pasted = images * std + mean, pasted * std + mean
    columns = {"original": original, "masked": original.masked_fill(hidden, GREY), "reconstruction": pasted}
    return _grid({name: _pixels(x) for name, x in columns.items()})


def _pixels(images: Tensor) -> np.ndarray:
    rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    return (255 * rgb.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _grid(columns: dict[str, np.ndarray]) -> Image.Image:
    """Labelled columns of pictures, each enlarged to at least 96 pixels where smaller."""
    count, height, width, _ = next(iter(columns.values())).shape
    scale = max(1, -(-96 // width))
    height, width = height * scale, width * scale
    sheet = Image.new("RGB", (len(columns) * (width + GAP) + GAP, count * (height + GAP) + GAP + LABEL), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, pictures) in enumerate(columns.items()):
        left = GAP + i * (width + GAP)
        draw.text((left, 2), name, fill="black")
        for j, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, LABEL + GAP + j * (height + GAP)))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, atomically."""
    write_atomic(path, lambda p: picture.save(p, format="PNG"))


def draw_confusion(confusion: dict[str, Any], path: Path) -> None:
    """The shares of each class's images that were taken for each class, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    classes, counts = confusion["classes"], np.array(confusion["counts"], dtype=float)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    side = min(12, max(4, 0.35 * len(classes)))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(picture, label="% of the true class")
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))


def draw_accuracy(evaluations: Path, path: Path) -> None:
    """The top-1 accuracies measured over the epochs, from evaluations.jsonl, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in evaluations.read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("top1", "weights"), ("ema_top1", "their moving average")):
        if name in rows[-1]:
            axes.plot([row["epoch"] for row in rows], [100 * row[name] for row in rows], marker=".", label=label)
    axes.set(xlabel="epoch", ylabel="top-1 on held-out images, %")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))


def draw_loss(metrics: Path, path: Path, what: str = "loss on masked patches") -> None:
    """The loss of each step and its mean over each epoch, from metrics.jsonl, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    epochs = np.array([row["epoch"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    whole = np.ceil(epochs - 1e-6).astype(int)
    means = [losses[whole == e].mean() for e in np.unique(whole)]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, losses, color="0.75", linewidth=1, label="step")
    axes.plot(np.unique(whole) - 0.5, means, color="tab:blue", marker=".", label="mean of the epoch")
    axes.set(xlabel="epoch", ylabel=what, xlim=(0, epochs[-1]))
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=120))
