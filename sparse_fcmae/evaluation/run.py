"""A model run over all images of a source."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_fcmae.backends import choose_dtype
from sparse_fcmae.data.batches import Batch, EvaluationImages, make_loader
from sparse_fcmae.data.decoders.image import Reading, reading_of
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.windows import Covering
from sparse_fcmae.data.survey import reading_options
from sparse_fcmae.data.views import CentreView, default_crop_fraction
from sparse_fcmae.evaluation.config import SeeingConfig
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.runtime.device import choose_device, loader_processes
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of
from sparse_fcmae.weights.weights import Weights

FLIPS = {None: ((),), "horizontal": ((), (3,)), "both": ((), (3,), (2,), (2, 3))}  # axes that images are flipped along


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

    @property
    def of_image(self) -> CentreView:
        """The part of an image, or of a window of it, that the model sees."""
        return CentreView(self.size, self.reading, 1.0 if self.native else self.crop_fraction)


def view_of(config: SeeingConfig, weights: Weights, device: torch.device | None = None) -> EvaluationView:
    """How weights are to see images. Raises UserError for an image size that does not suit their patch.

    device: None for the one that the options say.
    """
    device = device or choose_device(config.device)
    size = image_size_of(config.image_size or weights.architecture["image_size"])
    with torch.device("meta"):
        SparseEncoder(**weights.architecture).grid(*size)
    reading = reading_of(weights.form, **reading_options(config))
    batch_bytes = config.batch_size * CentreView(size, reading).nbytes
    workers, notes = loader_processes(device, config.num_workers, batch_bytes)
    for note in notes:
        print(note)
    bf16 = choose_dtype(config.dtype, device, config.backend) == torch.bfloat16
    if weights.task == "regression" and config.dtype == "bf16":
        raise UserError("`dtype=bf16` would round the numbers that this model says to three digits: leave it out")
    native = weights.form.native if config.crop is None else config.crop == "native"
    if native and config.crop_fraction is not None:
        raise UserError("`crop_fraction` goes with `crop=resized` alone")
    return EvaluationView(
        size=size,
        form=weights.form,
        reading=reading,
        crop_fraction=config.crop_fraction or default_crop_fraction(size),
        device=device,
        bf16=bf16 and weights.task != "regression",
        batch_size=config.batch_size,
        num_workers=workers,
        native=native,
    )


class EvaluationSet:
    """What a model sees of labelled images: the images, or under native windows those that cover them.

    Made once, it can be run over again and again. ranks: the processes that have a set each, and run a model together.
    seen: the samples. image_of: int64, for each of them the index of its image in the source. left_out: the images of
    which there is nothing to see. batches: the indices of the samples of each. rounds: batches of the rank with most.
    """

    def __init__(self, source: Labelled, view: EvaluationView, ranks: Ranks | None = None) -> None:
        self.source, self.view = source, view
        self.seen: ImageSource = source
        self.image_of, self.left_out = torch.arange(len(source)), list(source.left_out)
        if view.native and len(source):
            self.seen = windows = Covering(source, view.size, view.reading)
            self.image_of = self.image_of.repeat_interleave(torch.from_numpy(windows.counts()))
            self.left_out += windows.left_out
        self.batches = [part.tolist() for part in torch.arange(len(self.seen)).split(view.batch_size)]
        self.rounds = max(ranks.gather(len(self.batches))) if ranks else 0


def run_model(
    images: EvaluationSet, function: Callable[[Tensor], Tensor], description: str | None = None
) -> tuple[Tensor, Tensor, list[BadImage]]:
    """Applies a function of normalised images [B, C, H, W], such as a model, to all images of a set.

    The result is that of `run_on_batches`.
    """
    return run_on_batches(images, lambda normalised, batch: function(normalised), description)


@torch.no_grad()
def run_on_batches(
    images: EvaluationSet, function: Callable[[Tensor, Batch], Tensor], description: str | None = None
) -> tuple[Tensor, Tensor, list[BadImage]]:
    """The same for a function of normalised images and of the batch that they are from, with samples by their index.

    Under native windows an image's output is the mean over those that cover it. Ranks that have fewer batches than
    others apply it to an image of zeros as well, as a model that is sharded runs on all ranks or none.

    Returns the outputs, float32 [N, ...] on the CPU, the index of the image that each is of, int64 [N], and the
    unreadable images, which are left out, as are those with an unreadable window; `check_any` raises where N is 0.
    description: the text of a progress bar, which the source's notes precede; None for neither bar nor notes.
    """
    source, seen, image_of, view = images.source, images.seen, images.image_of, images.view
    dataset = EvaluationImages(seen, view.of_image)
    loader = make_loader(dataset, images.batches, view.num_workers, pin_memory=view.device.type == "cuda")
    sums, read, bad, rounds = None, torch.zeros(len(source), dtype=torch.int64), list(images.left_out), 0

    def run(batch: Batch) -> Tensor:
        normalised = view.form.normalise(batch.pixels.to(view.device, non_blocking=True))
        with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
            return function(normalised, batch).float().cpu()

    unit = "window" if view.native else "image"
    bar = tqdm(total=len(seen), desc=description, unit=unit, disable=not description, dynamic_ncols=True)
    with bar, loader.explained():
        for note in seen.notes if description else ():
            bar.write(note, file=sys.stderr)
        for batch in loader if len(seen) else ():
            bad += batch.bad
            if len(batch.pixels):
                outputs, rounds = run(batch), rounds + 1
                if sums is None:
                    sums = outputs.new_zeros(len(source), *outputs.shape[1:])
                of = image_of[batch.index]
                sums.index_add_(0, of, outputs)
                read.index_add_(0, of, torch.ones_like(of))
            bar.update(len(batch.pixels) + len(batch.bad))
    if rounds < images.rounds:
        pixels = torch.zeros(1, *view.size, view.form.in_chans, dtype=getattr(torch, view.reading.dtype))
    for _ in range(rounds, images.rounds):
        run(Batch(pixels, torch.zeros(1, dtype=torch.int64), []))
    expected = image_of.bincount(minlength=len(source))
    if view.native:  # each window of an image may have said the same
        reasons = dict(bad)
        names = [source.name(int(index)) for index in torch.nonzero(read < expected)]
        bad = [*images.left_out, *(BadImage(name, reasons[name]) for name in names)]
    index = torch.nonzero((read == expected) & (read > 0))[:, 0]
    if sums is None:
        return torch.empty(0), index, bad
    return sums[index] / read[index].view(-1, *[1] * (sums.ndim - 1)), index, bad


def together(of_ranks: Sequence[Sequence[BadImage]]) -> list[BadImage]:
    """The unreadable images of all ranks. Those that all have left out come once."""
    return list(dict.fromkeys(image for of_rank in of_ranks for image in of_rank))


def check_any(index: Tensor, bad: Sequence[BadImage], source: ImageSource) -> None:
    """Raises UserError where no image was readable. index, bad: as `run_model` gives them, of all ranks together."""
    if not len(index):
        raise UserError(f"no image of {source} is readable: {bad[0].name}: {bad[0].reason}")
