"""Which images a batch holds, and the processes that load them.

Every sample is determined by (seed, epoch, index) alone. So a run gets the same batches with any number of processes,
and goes on with them when it is resumed.
"""

import atexit
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sparse_fcmae.data.decoders.image import Box
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line
from sparse_fcmae.runtime.signals import STOPPING
from sparse_fcmae.runtime.streams import Stream, numpy_generator

KILLED = re.compile(r"DataLoader worker \(pid")  # how PyTorch's error begins
TRIES = 10  # images that are opened for one sample before it is given up
LOADER_PROCESSES: WeakSet[BaseProcess] = WeakSet()  # that this process has started


class Sample(NamedTuple):
    """pixels: [H, W, C] from the view, or None where no image could be read. index: of the image in its source. bad:
    the unreadable images that were met on the way. box: of a window in its image, else None. labels: of the pixels,
    int16 [h, w], where the view gives them, else None."""

    pixels: Tensor | None
    index: int
    bad: list[BadImage]
    box: Box | None = None
    labels: Tensor | None = None


class Batch(NamedTuple):
    """pixels: [B, H, W, C]. index: int64 [B], of the images in their source. bad: the unreadable images that were
    met on the way. boxes: int64 [B, 4], left, top, right, bottom of windows in their images; None of whole images.
    labels: of the pixels of each, int16 [h, w]; None where the view gives none."""

    pixels: Tensor
    index: Tensor
    bad: list[BadImage]
    boxes: Tensor | None = None
    labels: list[Tensor] | None = None


class TrainingImages(Dataset):
    """Random views of a source's images, by keys (epoch, index). A view gives pixels, or pixels and their labels.

    Another random image takes the place of one that can't be read. Where TRIES images in a row can't be read, the
    sample has no pixels.
    """

    def __init__(self, source: ImageSource, view: Callable[[Any, np.random.Generator], Any], seed: int) -> None:
        self.source, self.view, self.seed = source, view, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = numpy_generator(self.seed, Stream.CROPS, epoch, index)
        bad = []
        for _ in range(TRIES):
            try:
                with self.source.open(index) as file:
                    pixels, labels = _apart(self.view(file, rng))
                    return Sample(pixels, index, bad, labels=labels)
            except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
                bad.append(BadImage(self.source.name(index), one_line(error)))
                index = int(rng.integers(len(self.source)))
        return Sample(None, index, bad)


class EvaluationImages(Dataset):
    """Fixed views of a source's images, by index. The sample of an image that can't be read has no pixels."""

    def __init__(self, source: ImageSource, view: Callable[[Any], Any]) -> None:
        self.source, self.view = source, view

    def __getitem__(self, index: int) -> Sample:
        try:
            with self.source.open(index) as file:
                pixels, labels = _apart(self.view(file))
                return Sample(pixels, index, [], getattr(file, "box", None), labels)
        except Exception as error:
            return Sample(None, index, [BadImage(self.source.name(index), one_line(error))])


def micro_batches(
    images: int, batch_size: int, steps: range, seed: int, rank: int, world: int, micro_batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """The keys (epoch, index) of each micro-batch of a rank, for optimiser steps counted from 0 over all epochs.

    An epoch is a random permutation of the images without its incomplete last batch. The order depends on the seed
    alone. Of each global batch the first rank takes the first images, the second rank the next, and so on.
    """
    steps_per_epoch, images_per_rank = images // batch_size, batch_size // world
    order_of = None
    for step in steps:
        epoch, place = divmod(step, steps_per_epoch)
        if epoch != order_of:
            order, order_of = numpy_generator(seed, Stream.ORDER, epoch).permutation(images), epoch
        first = place * batch_size + rank * images_per_rank
        keys = [(epoch, int(index)) for index in order[first : first + images_per_rank]]
        for start in range(0, images_per_rank, micro_batch_size):
            yield keys[start : start + micro_batch_size]


def make_loader(dataset: Dataset, batches: Iterable[list], num_workers: int, pin_memory: bool) -> "Loader":
    """A loader of `Batch`es, one for each list of keys in `batches`. 0 processes load in the calling one."""
    return Loader(
        Noted(dataset, num_workers),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
    )


class Noted(Dataset):
    """A data set of which each loader process notes the image that it reads.

    reading: int64 [processes], the indices of these images, shared by all processes; -1 before the first.
    """

    def __init__(self, dataset: Dataset, processes: int) -> None:
        self.dataset, self.reading = dataset, torch.full((processes,), -1).share_memory_()

    def __getitem__(self, key: Any) -> Sample:
        if process := get_worker_info():
            self.reading[process.id] = key[1] if isinstance(key, tuple) else key
        return self.dataset[key]


class Loader(DataLoader):
    """A DataLoader whose processes ignore the signals that stop a run, and are ended at exit all the same."""

    def __iter__(self) -> Iterator[Batch]:
        before = multiprocessing.active_children()
        batches = super().__iter__()
        LOADER_PROCESSES.update(process for process in multiprocessing.active_children() if process not in before)
        self.processes = getattr(batches, "_workers", [])
        return batches

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Has what PyTorch raises where one of the processes was killed, at any moment, be a UserError instead."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:  # the latter two where it was passing a batch on
            self._end_complaints()
            dead = [number for number, process in enumerate(self.processes) if not process.is_alive()]
            if not (dead or KILLED.match(str(error))):
                raise
            index = int(self.dataset.reading[dead[0]]) if dead else -1
            last = f" while it read {self.dataset.dataset.source.name(index)}, or just after" if index >= 0 else ""
            raise UserError(
                f"a process that loads images was killed{last}: if memory was short, give fewer `num_workers`; "
                "what was done is kept, to be gone on with"
            ) from None

    def _end_complaints(self) -> None:
        """Ends PyTorch's raising an error at every signal of a process that has ended, which may come at any moment."""
        if self.processes and hasattr(signal, "SIGCHLD"):
            with suppress(RuntimeError):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _apart(seen: Tensor | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Pixels and their labels, of what a view gives."""
    return seen if isinstance(seen, tuple) else (seen, None)


def _collate(samples: list[Sample]) -> Batch:
    """A batch of the samples that have pixels."""
    readable = [sample for sample in samples if sample.pixels is not None]
    pixels = [sample.pixels for sample in readable]
    return Batch(
        torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8),
        torch.tensor([sample.index for sample in readable], dtype=torch.int64),
        [image for sample in samples for image in sample.bad],
        torch.tensor([sample.box for sample in readable]) if readable and readable[0].box else None,
        [sample.labels for sample in readable] if readable and readable[0].labels is not None else None,
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Has a loader process outlive the signals that batch systems and terminals send to all processes of a run.

    The trainer then ends its step, saves a checkpoint and ends the loader. Where the trainer is gone, PyTorch's loader
    ends by itself.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_loader_processes() -> None:
    """Ends the loader processes that are left at exit, which the SIGTERM that Python sends them would not.

    Some are left where an exception or a cycle of references still holds the loader.
    """
    left = [process for process in multiprocessing.active_children() if process in LOADER_PROCESSES]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise for each
    for process in left:
        process.kill()
