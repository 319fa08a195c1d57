"""What a run plans before its first step: how many steps, of how many images, at which learning rate."""

import math
from dataclasses import dataclass

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.lr_range import STEPS, range_of_rates, rising_lr

CHECKPOINT_STEPS = 500  # between checkpoints at most, where the user does not say how many


@dataclass(frozen=True)
class Schedule:
    """The plan of a run.

    batch_size: images of a step. images_per_rank: of a step, on each rank. micro_batch_size: images that go through the
    model at once. steps_per_epoch: an epoch's incomplete last batch is left out. steps, warmup_steps: of the whole run.
    peak_lr, min_lr: of the learning rate. save_every: steps between checkpoints. eval_steps: between evaluations.
    lr_range: the rates between which a range test rises.
    """

    batch_size: int
    images_per_rank: int
    micro_batch_size: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float
    save_every: int
    eval_steps: int
    lr_range: tuple[float, float] | None = None

    @classmethod
    def of(cls, config: RunConfig, images: int, world: int, min_lr: float = 0.0) -> "Schedule":
        """The plan of a config that leaves nothing open, for so many images and processes.

        Raises UserError where the batch does not suit the images or the processes.
        """
        batch = config.batch_size
        if images < world:
            raise UserError(f"{images} images are too few for {world} processes: start at most {images}")
        if batch > images:
            raise UserError(
                f"`batch_size` {batch} is more than the {images} images in {config.data}: choose {images} or less"
            )
        if batch % world:
            nearest = max(1, min(round(batch / world), images // world)) * world
            raise UserError(f"`batch_size` {batch} can't be divided evenly among {world} processes: choose {nearest}")
        steps_per_epoch = images // batch
        rates = range_of_rates(config.lr_range) if config.lr_range else None
        steps = config.max_steps or (STEPS if rates else config.epochs * steps_per_epoch)
        return cls(
            batch_size=batch,
            images_per_rank=batch // world,
            micro_batch_size=config.micro_batch_size,
            steps_per_epoch=steps_per_epoch,
            steps=steps,
            warmup_steps=min(steps, round(config.warmup_epochs * steps_per_epoch)),
            peak_lr=config.lr if config.lr is not None else config.base_lr * batch / 256,
            min_lr=min_lr,
            save_every=config.save_every or min(steps_per_epoch, CHECKPOINT_STEPS),
            eval_steps=config.eval_every * steps_per_epoch,
            lr_range=rates,
        )

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.lr_range:
            return rising_lr(step, self.steps, *self.lr_range)
        return cosine_lr(step, self.steps, self.warmup_steps, self.peak_lr, self.min_lr)

    def epoch(self, step: int) -> float:
        """How many epochs so many steps are."""
        return step / self.steps_per_epoch

    def micro_batches(self) -> list[tuple[int, int]]:
        """The first image of each of a step's micro-batches on a rank, counted from 0, and how many it has."""
        firsts = range(0, self.images_per_rank, self.micro_batch_size)
        return [(first, min(self.micro_batch_size, self.images_per_rank - first)) for first in firsts]

    def evaluates_after(self, step: int) -> bool:
        """Whether the model is evaluated once so many steps are done."""
        return step % self.eval_steps == 0 or step == self.steps

    def __str__(self) -> str:
        if self.lr_range:
            first, last = self.lr_range
            return f"{self.batch_size} a step, {self.steps} steps of a range test, lr from {first:.3g} to {last:.3g}"
        return (
            f"{self.batch_size} a step, {self.steps_per_epoch} steps an epoch, {self.steps} in all, "
            f"{self.warmup_steps} of warm-up, peak lr {self.peak_lr:.3g}"
        )


def cosine_lr(step: int, steps: int, warmup: int, peak: float, least: float = 0.0) -> float:
    """The rate of a step counted from 0: `warmup` equal increments up to `peak`, then half a cosine towards `least`."""
    least = min(least, peak)
    if step < warmup:
        return peak * (step + 1) / warmup
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
