"""What a run keeps between its steps until it is recorded: losses that are still on the device, unreadable images."""

from pathlib import Path

import torch
from torch import Tensor

from sparse_fcmae.data.batches import Batch
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.schedule import Schedule


class Progress:
    """The steps since the last flush, and all images that were found unreadable.

    bad: the reasons by the image's name, on from what an earlier process of the run found. start: the steps that were
    done then. done: those that are.
    """

    def __init__(
        self,
        config: RunConfig,
        schedule: Schedule,
        source: ImageSource,
        log: RunLog,
        ranks: Ranks,
        bad: dict[str, str],
        start: int,
    ) -> None:
        self.config, self.schedule, self.source, self.log, self.ranks = config, schedule, source, log, ranks
        self.bad, self.new_bad = bad, []
        self.losses: list[Tensor] = []
        self.lrs: list[float] = []
        self.done = start

    def take(self, batch: Batch, images: int) -> None:
        """Notes a micro-batch's unreadable images. Raises UserError unless it has so many images all the same."""
        self.new_bad += batch.bad
        if len(batch.pixels) < images:
            name, reason = batch.bad[-1]
            self.new_bad = []  # as a source that is out of reach has no bad images
            raise UserError(f"no readable image found in many tries: {name}: {reason}; check `data`")

    def step_done(self, loss: Tensor, lr: float) -> None:
        """Notes a step, and that the weights and all that follows them have changed with it."""
        self.done += 1
        self.losses.append(loss)
        self.lrs.append(lr)

    def flush(self, step: int, waited: float) -> None:
        """Takes the losses up to a step off the device, shares what single ranks know, and records it all.

        waited: seconds since the last flush in which no image was there to train on. All ranks call this at the same
        steps. Raises UserError where too many images are unreadable.
        """
        losses = self.ranks.mean(torch.stack(self.losses)).tolist()
        images = len(losses) * self.config.batch_size
        self.log.steps(step, self.schedule.steps_per_epoch, losses, self.lrs, images, waited)
        for found in (found for of_rank in self.ranks.gather(self.new_bad) for found in of_rank):
            if found.name not in self.bad:
                self.bad[found.name] = found.reason
                self.log.say(f"unreadable, replaced by another image: {found.name}: {found.reason}")
        self.losses, self.lrs, self.new_bad = [], [], []
        images = getattr(self.source, "images", len(self.source))  # fewer than windows
        if len(self.bad) > self.config.max_bad_images * images:
            raise UserError(
                f"{len(self.bad)} of {images} images are unreadable, such as {next(iter(self.bad))}: raise "
                f"`max_bad_images` and give `resume=True`, or remove those that {Path(self.config.out) / 'train.log'} "
                "names and start anew"
            )
