"""What a run keeps between its steps until it is recorded: losses that are still on the device, unreadable images."""

import math
import time
from collections import deque
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from sparse_fcmae.data.batches import Batch
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.runtime.device import peak_flops, peak_memory
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.energy import EnergyMeter
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.log import REPLACED, RunLog
from sparse_fcmae.training.schedule import Schedule
from sparse_fcmae.training.step import StepResult

STARTING, RISEN = 10, 200  # steps whose mean loss is that of the start, and whose mean is compared with it
NAMED = 10  # skipped steps that a line names


class Diverged(UserError):
    """A run whose steps no longer have a finite loss and gradient. Its last steps are not worth a checkpoint."""


class Progress:
    """The steps since the last flush, and all images that were found unreadable.

    bad: the reasons by the image's name, on from what an earlier process of the run found. start: the steps that were
    done then. done: those that are. flops: of an image, forward and backward, 0 where they are not known.
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
        flops: float = 0.0,
    ) -> None:
        self.config, self.schedule, self.source, self.log, self.ranks = config, schedule, source, log, ranks
        self.bad, self.new_bad = bad, []
        self.results: list[Tensor] = []
        self.nonfinite = self.skipped = 0  # steps in a row, and of this process in all
        self.first, self.last = [], deque(maxlen=RISEN)  # losses
        self.lrs: list[float] = []
        self.start = self.done = start
        self.flops, self.began = flops, time.monotonic()

    def summary(self, meter: EnergyMeter | None) -> str:
        """What this process has done, in a line: steps, time, speed, energy."""
        steps, seconds = self.done - self.start, time.monotonic() - self.began
        words = [f"{steps} steps in {shown_time(seconds)}"]
        if steps:
            words.append(f"{steps * self.config.batch_size / seconds:.1f} images/s with all that is around them")
        words += [str(meter)] * bool(meter) + [f"{len(self.bad)} unreadable images"] * bool(self.bad)
        return "done: " + ", ".join(words)

    def take(self, batch: Batch, images: int) -> None:
        """Notes a micro-batch's unreadable images. Raises UserError unless it has so many images all the same."""
        self.new_bad += batch.bad
        if len(batch.pixels) < images:
            name, reason = batch.bad[-1]
            self.new_bad = []  # as a source that is out of reach has no bad images
            raise UserError(f"no readable image found in many tries: {name}: {reason}; check `data`")

    def step_done(self, result: StepResult, lr: float) -> None:
        """Notes a step, and that the weights and all that follows them have changed with it."""
        self.done += 1
        self.results.append(torch.stack(result))
        self.lrs.append(lr)

    def flush(self, step: int, waited: float) -> None:
        """Takes the losses up to a step off the device, shares what single ranks know, and records it all.

        waited: seconds since the last flush in which no image was there to train on. All ranks call this at the same
        steps. Raises UserError where too many images are unreadable, and Diverged.
        """
        losses, norms = self.ranks.mean(torch.stack(self.results)).T.tolist()
        images = len(losses) * self.config.batch_size
        lrs, self.results, self.lrs = self.lrs, [], []
        diverged = self._count_nonfinite(step, losses, norms)
        self.log.steps(step, self.schedule.steps_per_epoch, losses, norms, lrs, images, waited, self._about)
        if diverged:
            raise Diverged(
                f"loss or gradient were not finite in {self.config.max_nonfinite} steps in a row, up to step "
                f"{diverged}: lower `lr` or `base_lr`, or give `clip_grad=1`, and go on with `resume=True`"
            )
        self._watch(losses)
        for found in (found for of_rank in self.ranks.gather(self.new_bad) for found in of_rank):
            if found.name not in self.bad:
                self.bad[found.name] = found.reason
                self.log.say(f"{REPLACED}{found.name}: {found.reason}")
        self.new_bad = []
        images = getattr(self.source, "images", len(self.source))  # fewer than windows
        if len(self.bad) > self.config.max_bad_images * images:
            raise UserError(
                f"{len(self.bad)} of {images} images are unreadable, such as {next(iter(self.bad))}: raise "
                f"`max_bad_images` and give `resume=True`, or remove those that {Path(self.config.out) / 'train.log'} "
                "names and start anew"
            )

    def _about(self, speed: float) -> dict[str, float]:
        """What metrics.jsonl has of the steps beside, at so many images a second."""
        device, done = self.ranks.device, self.flops * speed / self.ranks.world
        values = {"memory_gb": round(peak_memory(device) / 1e9, 3)}
        values |= {"unreadable": len(self.bad), "nonfinite": self.skipped}
        if self.flops:
            values["tflops"] = round(done / 1e12, 4)
        if self.flops and (peak := peak_flops(device)):
            values["mfu"] = round(done / peak, 4)
        return values

    def _count_nonfinite(self, last: int, losses: list[float], norms: list[float]) -> int | None:
        """Says which of the steps up to `last` were skipped; returns that at which there were too many in a row."""
        first, skipped, diverged = last - len(losses) + 1, [], None
        for step, values in enumerate(zip(losses, norms, strict=True), first):
            finite = all(map(math.isfinite, values))
            self.nonfinite = 0 if finite else self.nonfinite + 1
            skipped += [] if finite else [step]
            if self.nonfinite == self.config.max_nonfinite and not self.config.lr_range:  # which is to find out where
                diverged = diverged or step
        self.skipped += len(skipped)
        if skipped:
            numbers = ", ".join(map(str, skipped[:NAMED])) + (", ..." if len(skipped) > NAMED else "")
            self.log.say(f"skipped, as loss or gradient were not finite: step {numbers}")
        return diverged

    def _watch(self, losses: list[float]) -> None:
        """Says once that the loss has risen above its start and stays there. A run that was resumed has no start."""
        if self.start or self.first is None:
            return
        finite = [loss for loss in losses if math.isfinite(loss)]
        room = STARTING - len(self.first)
        self.first += finite[:room]
        self.last.extend(finite[room:] if room > 0 else finite)
        if len(self.last) < RISEN:
            return
        start, now = fmean(self.first), fmean(self.last)
        if now > start:
            self.log.say(
                f"the loss is {now:.4f} in the mean of the last {RISEN} steps, and was {start:.4f} at the start: if it "
                f"stays there, try --lr {self.schedule.peak_lr / 4:.2g}"
            )
            self.first = None


def shown_time(seconds: float) -> str:
    """Seconds as people say them: "3 h 20 min", "5 min 3 s", "12 s"."""
    hours, minutes = int(seconds // 3600), int(seconds // 60)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
