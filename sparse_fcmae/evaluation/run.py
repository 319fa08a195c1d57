"""A model run over all images of a source."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_fcmae.data.batches import BadImage, EvaluationImages, make_loader
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.runtime.errors import UserError


@dataclass(frozen=True)
class EvaluationView:
    """What a model sees of every image, and what runs it.

    size: (height, width) in pixels. form: what the model takes. reading: as what images are read for that.
    crop_fraction, native: as in `CentreView`. device: the model's. bf16: whether it computes in bfloat16, by autocast.
    batch_size: images at once. num_workers: processes that load images, 0 for none but the calling one.
    """

    size: tuple[int, int]
    form: ImageFormat
    reading: Reading
    crop_fraction: float
    device: torch.device
    bf16: bool = False
    batch_size: int = 64
    num_workers: int = 0
    native: bool = False


@torch.no_grad()
def run_model(
    source: ImageSource, function: Callable[[Tensor], Tensor], view: EvaluationView, description: str | None = None
) -> tuple[Tensor, Tensor, list[BadImage]]:
    """Applies a function of normalised images [B, C, H, W], such as a model, to all images of a source.

    Returns its outputs, float32 [N, ...] on the CPU, the index of the image that each is of, int64 [N], and the
    unreadable images, which are left out. description: the text of a progress bar, which the source's notes precede;
    None for neither bar nor notes. Raises UserError where no image is readable.
    """
    dataset = EvaluationImages(source, CentreView(view.size, view.reading, view.crop_fraction, view.native))
    batches = [part.tolist() for part in torch.arange(len(source)).split(view.batch_size)]
    loader = make_loader(dataset, batches, view.num_workers, pin_memory=view.device.type == "cuda")
    outputs, index, bad = [], [], []
    with tqdm(total=len(source), desc=description, unit="image", disable=not description, dynamic_ncols=True) as bar:
        for note in source.notes if description else ():
            bar.write(note, file=sys.stderr)
        for batch in loader:
            bad += batch.bad
            if len(batch.pixels):
                images = view.form.normalise(batch.pixels.to(view.device, non_blocking=True))
                with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
                    outputs.append(function(images).float().cpu())
                index.append(batch.index)
            bar.update(len(batch.pixels) + len(batch.bad))
    if not outputs:
        raise UserError(f"no image of {source} is readable: {bad[0].name}: {bad[0].reason}")
    return torch.cat(outputs), torch.cat(index), bad
