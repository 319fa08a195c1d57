"""A model run over all images of a source."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_fcmae.data.batches import EvaluationImages, make_loader
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.windows import Covering
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.runtime.errors import UserError


@dataclass(frozen=True)
class EvaluationView:
    """What a model sees of every image, and what runs it.

    size: (height, width) in pixels. form: what the model takes. reading: as what images are read for that.
    crop_fraction: as in `CentreView`. native: the model sees windows of the size that cover an image, in its own
    resolution. device: the model's. bf16: whether it computes in bfloat16, by autocast.
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

    Under native windows an image's output is the mean over those that cover it. Returns the outputs, float32 [N, ...]
    on the CPU, the index of the image that each is of, int64 [N], and the unreadable images, which are left out, as are
    those with an unreadable window. description: the text of a progress bar, which the source's notes precede; None for
    neither bar nor notes. Raises UserError where no image is readable.
    """
    seen, image_of, bad = _seen(source, view)
    dataset = EvaluationImages(seen, CentreView(view.size, view.reading, 1.0 if view.native else view.crop_fraction))
    batches = [part.tolist() for part in torch.arange(len(seen)).split(view.batch_size)]
    loader = make_loader(dataset, batches, view.num_workers, pin_memory=view.device.type == "cuda")
    sums, read = torch.empty(0), torch.zeros(len(source), dtype=torch.int64)
    unit = "window" if view.native else "image"
    with tqdm(total=len(seen), desc=description, unit=unit, disable=not description, dynamic_ncols=True) as bar:
        for note in seen.notes if description else ():
            bar.write(note, file=sys.stderr)
        for batch in loader:
            bad += batch.bad
            if len(batch.pixels):
                images = view.form.normalise(batch.pixels.to(view.device, non_blocking=True))
                with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
                    outputs = function(images).float().cpu()
                if not read.any():
                    sums = outputs.new_zeros(len(source), *outputs.shape[1:])
                sums.index_add_(0, image_of[batch.index], outputs)
                read += image_of[batch.index].bincount(minlength=len(source))
            bar.update(len(batch.pixels) + len(batch.bad))
    if view.native:  # each window of an image may have said the same
        bad = list({image.name: image for image in bad}.values())
    index = torch.nonzero((read == image_of.bincount(minlength=len(source))) & (read > 0))[:, 0]
    if not len(index):
        raise UserError(f"no image of {source} is readable: {bad[0].name}: {bad[0].reason}")
    return sums[index] / read[index].view(-1, *[1] * (sums.ndim - 1)), index, bad


def _seen(source: ImageSource, view: EvaluationView) -> tuple[ImageSource, Tensor, list[BadImage]]:
    """What the model sees of a source: its images, or the windows that cover them.

    Returns with it the index of the image that each is of, int64, and the images of which there is no window.
    """
    if not view.native:
        return source, torch.arange(len(source)), []
    windows = Covering(source, view.size, view.reading)
    return (
        windows,
        torch.arange(len(source)).repeat_interleave(torch.from_numpy(windows.counts())),
        list(windows.left_out),
    )
