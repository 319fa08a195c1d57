"""What a pretrained model fills in, and pictures of it: original, masked and reconstructed images side by side."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.pictures import rgb, shown
from sparse_fcmae.evaluation.sheet import sheet
from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.model.fcmae import FCMAE, patchify, unpatchify

COLUMNS = ("original", "masked", "predicted", "filled in")  # of a picture
GREY = 0.5  # of masked pixels


class Reconstruction(NamedTuple):
    """Images, what is predicted of all their patches, float32 [N, C, H, W], normalised; and what was hidden.

    hidden: bool [N, C, H, W]. Where the model learns normalised targets, each predicted patch has the mean and variance
    of the true one, as only its pattern is learnt. loss: the mean over hidden patches, a scalar.
    """

    images: Tensor
    predicted: Tensor
    hidden: Tensor
    loss: Tensor


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
def reconstruct(model: FCMAE, form: ImageFormat, pixels: Tensor, mask: Tensor) -> Reconstruction:
    """What a model makes of pixels [N, H, W, C] of the format's dtype under a mask, bool [N, H/P, W/P]."""
    images, mask = form.normalise(pixels), mask.to(pixels.device)
    output = model(pixels.permute(0, 3, 1, 2), mask, statistics=form.statistics(pixels.device))
    predicted, patches = output.prediction.float(), patchify(images, model.patch_size)
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + EPS).sqrt() + mean
    hidden = mask.flatten(1)[..., None].expand_as(patches)
    predicted, hidden = (unpatchify(part, model.patch_size, mask.shape[1:]) for part in (predicted, hidden))
    return Reconstruction(images, predicted, hidden, output.loss)


def draw_reconstruction(
    found: Reconstruction, form: ImageFormat, rows: Sequence[str] = (), channels: Sequence[int] = (), note: str = ""
) -> Image.Image:
    """A picture with a row for each image: original, masked, predicted, and the prediction beside visible pixels.

    Photographs are shown as they are, other images between quantiles of each channel. rows: names of the rows.
    channels: as in `rgb`. note: what stands beside the first column's name.
    """
    filled = torch.where(found.hidden, found.predicted, found.images)
    original, predicted, filled = (shown(form, part, found.images) for part in (found.images, found.predicted, filled))
    parts = (original, original.masked_fill(found.hidden, GREY), predicted, filled)
    names = (f"{COLUMNS[0]}{note}", *COLUMNS[1:])
    return sheet({name: rgb(part, channels) for name, part in zip(names, parts, strict=True)}, rows)
