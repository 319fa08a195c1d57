"""Pictures of what a pretrained model fills in: original, masked and reconstructed images side by side."""

from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.pictures import rgb, sheet, shown
from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.model.fcmae import FCMAE, patchify, unpatchify

GREY = 0.5  # of masked pixels


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
    output = model(pixels.permute(0, 3, 1, 2), generator=generator, statistics=form.statistics(pixels.device))
    patches = patchify(images, model.patch_size)
    predicted = output.prediction.float()
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + EPS).sqrt() + mean
    hidden = output.mask.flatten(1)[..., None]
    grid = output.mask.shape[1:]
    pasted = unpatchify(torch.where(hidden, predicted, patches), model.patch_size, grid)
    hidden = unpatchify(hidden.expand_as(patches), model.patch_size, grid)
    original, pasted = shown(form, images, images), shown(form, pasted, images)
    masked = original.masked_fill(hidden, GREY)
    return sheet({"original": rgb(original), "masked": rgb(masked), "reconstruction": rgb(pasted)})
