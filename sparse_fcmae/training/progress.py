"""What a training loop plans before its steps, and keeps between them."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.config import RunConfig
from sparse_fcmae.data import Batch, ImageFolder
from sparse_fcmae.errors import UserError
from sparse_fcmae.training.distributed import Ranks
from sparse_fcmae.training.logging import RunLog
from sparse_fcmae.training.optim import cosine_lr


@dataclass(frozen=True)
class Schedule:
    """share: images of a step on each rank. per_epoch: steps an epoch. steps, warmup: of the run. peak_lr, min_lr: of
    the cosine. save_every: steps between checkpoints."""

    share: int
    per_epoch: int
    steps: int
    warmup: int
    peak_lr: float
    min_lr: float
    save_every: int

    @classmethod
    def of(
        cls,
        config: RunConfig,
        images: int,
        world: int,
        *,
        warmup_epochs: float,
        min_lr: float = 0.0,
    ) -> "Schedule":
        """That of a config without open ends; UserError where the batch does not suit the images or the processes."""
        batch = config.batch_size
        if batch > images:
            raise UserError(
                f"--batch-size {batch} is more than the {images} images in {config.data}: choose {images} or less"
            )
        if batch % world:
            raise UserError(f"--batch-size {batch} can't be shared evenly by {world} processes")
        per_epoch = images // batch
        steps = config.epochs * per_epoch
        peak_lr = config.lr if config.lr is not None else config.base_lr * batch / 256
        warmup = min(steps, round(warmup_epochs * per_epoch))
        return cls(batch // world, per_epoch, steps, warmup, peak_lr, min_lr, config.save_every or per_epoch)

    def describe(self, batch_size: int) -> str:
        return (
            f"{self.per_epoch} steps of {batch_size} an epoch, {self.steps} in all, {self.warmup} of warm-up, "
            f"peak lr {self.peak_lr:.3g}"
        )

    def lr(self, step: int) -> float:
        """The rate of a step counted from 0."""
        return cosine_lr(step, self.steps, self.warmup, self.peak_lr, self.min_lr)


class Progress:
    """Losses that are still on the device, and the files that were found unreadable.

    bad: their reasons by file, on from what an earlier process found.
    """

    def __init__(
        self,
        config: RunConfig,
        schedule: Schedule,
        folder: ImageFolder,
        log: RunLog,
        ranks: Ranks,
        bad: dict[str, str],
    ) -> None:
        self.config, self.schedule, self.folder, self.log, self.ranks = config, schedule, folder, log, ranks
        self.bad, self.new_bad = bad, []
        self.losses: list[Tensor] = []
        self.lrs: list[float] = []

    def take(self, batch: Batch, images: int) -> None:
        """Notes a micro-batch's unreadable files; UserError unless it has so many images all the same."""
        self.new_bad += batch.bad
        if len(batch.pixels) < images:
            file, reason = batch.bad[-1]
            raise UserError(f"no readable image found in many tries: {file}: {reason}; check --data")

    def done(self, loss: Tensor, lr: float) -> None:
        """Notes a step."""
        self.losses.append(loss)
        self.lrs.append(lr)

    def flush(self, step: int) -> None:
        """Takes the losses up to a step off the device, shares what ranks alone know, and records it."""
        values = self.ranks.mean(torch.stack(self.losses)).tolist()
        images = len(values) * self.config.batch_size
        self.log.steps(step, 1 / self.schedule.per_epoch, values, self.lrs, images)
        for entry in (entry for entries in self.ranks.gather(self.new_bad) for entry in entries):
            if entry.file not in self.bad:
                self.bad[entry.file] = entry.reason
                self.log.say(f"unreadable, replaced by another image: {entry.file}: {entry.reason}")
        self.losses, self.lrs, self.new_bad = [], [], []
        if len(self.bad) > self.config.max_bad_images * len(self.folder):
            raise UserError(
                f"{len(self.bad)} of {len(self.folder)} images are unreadable, such as {next(iter(self.bad))}: raise "
                f"--max-bad-images and --resume, or remove those that {Path(self.config.out) / 'train.log'} names and "
                "start anew"
            )


@contextmanager
def stop_signals(world: int) -> Iterator[Callable[[], bool]]:
    """Yields a function telling whether Ctrl-C or SIGTERM came: of one process, as many could not agree on a step.

    A second one raises KeyboardInterrupt at once.
    """
    received = []

    def stop(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    if world > 1 or threading.current_thread() is not threading.main_thread():  # others can't have handlers
        yield lambda: False
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
