"""Pictures of what a pretrained model fills in: original, masked and reconstructed images side by side."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sparse_fcmae.data.format import BYTE, ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.model.fcmae import FCMAE, TARGET_EPS, patchify, unpatchify
from sparse_fcmae.runtime.files import write_atomic

GREY = 0.5  # of masked pixels
SHOWN = (0.01, 0.99)  # quantiles of a channel that are shown as black and as white
GAP, LABEL_HEIGHT, LEAST_WIDTH = 4, 14, 96  # pixels of the grid


def sample_images(source: ImageSource, count: int, view: CentreView) -> Tensor:
    """Views of up to `count` images spread evenly over a source: [N, H, W, C] of the dtype that they are read as.

    Unreadable images are left out.
    """
    pixels = []
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        with suppress(Exception), source.open(int(index)) as file:  # training names the image in its log
            pixels.append(view(file))
    if pixels:
        return torch.stack(pixels)
    return torch.empty(0, *view.size, view.reading.in_chans, dtype=getattr(torch, view.reading.dtype))


@torch.no_grad()
def reconstruct(model: FCMAE, form: ImageFormat, pixels: Tensor, generator: torch.Generator) -> Image.Image:
    """A picture with a row for each image: original, masked, and the prediction beside the visible pixels.

    pixels: [N, H, W, C] on the model's device, of the format's dtype. Masks are drawn from `generator`. Where the model
    learns normalised targets, the prediction gets the mean and variance of the true patch back, as only its pattern is
    learnt. Photographs are shown as they are, other images between quantiles of each channel.
    """
    images = form.normalise(pixels)
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
    original, pasted = _shown(form, images, images), _shown(form, pasted, images)
    masked = original.masked_fill(hidden, GREY)
    return _grid({"original": _rgb(original), "masked": _rgb(masked), "reconstruction": _rgb(pasted)})


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, atomically."""
    write_atomic(path, lambda p: picture.save(p, format="PNG"))


def _shown(form: ImageFormat, images: Tensor, originals: Tensor) -> Tensor:
    """Normalised images [N, C, H, W] as values between 0 and 1, by one rule for all, which the originals give."""
    if form.is_photograph:
        return form.restore(images) / BYTE
    low, high = np.quantile(originals.cpu().numpy(), SHOWN, axis=(0, 2, 3), keepdims=True)
    low, high = (torch.tensor(limit[0], dtype=images.dtype, device=images.device) for limit in (low, high))
    return (images - low) / (high - low).clamp_min(1e-6)


def _rgb(images: Tensor) -> np.ndarray:
    """Values between 0 and 1 [N, C, H, W] as uint8 [N, H, W, 3]: the first three channels, or the first in grey."""
    rgb = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (255 * rgb.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _grid(columns: dict[str, np.ndarray]) -> Image.Image:
    """Columns of pictures [N, H, W, 3] under their names, enlarged to a width of at least LEAST_WIDTH."""
    count, height, width, _ = next(iter(columns.values())).shape
    scale = max(1, -(-LEAST_WIDTH // width))
    height, width = height * scale, width * scale
    size = (len(columns) * (width + GAP) + GAP, count * (height + GAP) + GAP + LABEL_HEIGHT)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, pictures) in enumerate(columns.items()):
        left = GAP + column * (width + GAP)
        draw.text((left, 2), name, fill="black")
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, LABEL_HEIGHT + GAP + row * (height + GAP)))
    return sheet
