"""Checkpoints of a run: when they are saved, and all that a run needs to go on from one exactly."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from shlex import quote

import torch

from sparse_fcmae.runtime import choices
from sparse_fcmae.runtime.checkpoint_folder import META, damage, folder_of, newest_checkpoint
from sparse_fcmae.runtime.errors import Interrupted, UserError
from sparse_fcmae.runtime.files import one_line, read_json
from sparse_fcmae.runtime.options import as_flags
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.runtime.shards import local
from sparse_fcmae.training.best import Best
from sparse_fcmae.training.checkpoint_files import (
    Keep,
    copied,
    load_model,
    read_checkpoint,
    write_checkpoint,
    write_sharded_checkpoint,
)
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.optim import layout_of_moments, load_optimizer
from sparse_fcmae.training.parallel import is_sharded
from sparse_fcmae.training.progress import Diverged, Progress
from sparse_fcmae.training.schedule import Schedule
from sparse_fcmae.training.signals import StoppedWaiting
from sparse_fcmae.training.task import Task

LEAST_SECONDS = 60  # between checkpoints, where the user does not say how many steps


class Checkpoints:
    """Saves a run's checkpoints: after every so many steps that the user asked for, or about as often as is useful.

    They are written by a thread while the run goes on. All ranks call `save` and `written` together.
    """

    def __init__(
        self,
        run: RunFolder,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        log: RunLog,
        unreadable: dict[str, str],
        start: int,
        best: Best,
    ) -> None:
        self.run, self.task, self.optimizer, self.schedule, self.log = run, task, optimizer, schedule, log
        self.unreadable, self.best = unreadable, best
        self.saved_step, self.saved_at = start, time.monotonic()
        self.writing, self.failed = threading.Thread(), None
        self.withholding = False
        self.ranks_of_thread = task.ranks.apart() if is_sharded(task.model) else task.ranks

    def __str__(self) -> str:
        steps = self.schedule.save_every
        often = "every step" if steps == 1 else f"every {steps} steps"
        if minutes := self.task.config.save_minutes:
            return f"a checkpoint every {minutes:g} minutes" + (f" and {often}" if self.task.config.save_every else "")
        if self.task.config.save_every:
            return f"a checkpoint {often}"
        return f"a checkpoint {often}, but at most one a minute (--save-every N: every N steps)"

    def asked_for(self, step: int) -> bool:
        """Whether a checkpoint is saved once so many steps are done, whatever the time."""
        intervals = (self.task.config.save_every, self.task.config.keep_every)
        return step == self.schedule.steps or any(interval and step % interval == 0 for interval in intervals)

    def due(self, step: int) -> bool:
        """Whether enough time has gone by, and enough steps where the user has asked for neither."""
        seconds = time.monotonic() - self.saved_at
        if minutes := self.task.config.save_minutes:
            return seconds >= 60 * minutes
        enough_steps = step - self.saved_step >= self.schedule.save_every
        return not self.task.config.save_every and enough_steps and seconds >= LEAST_SECONDS

    def agreed(self, step: int) -> bool:
        """`due`, by the clock of the main rank. All ranks call it together.

        Raises UserError on all of them where a checkpoint has turned out not to be written.
        """
        found = self.task.ranks.gather((self.due(step), None if self.writing.is_alive() else self.failed))
        _raise_first(failed for _, failed in found)
        return found[0][0]

    @contextmanager
    def withheld(self) -> Iterator[None]:
        """Saves nothing where the block ends early, as the steps that are done are not all known of until its end."""
        self.withholding = True
        yield
        self.withholding = False

    def save(self, step: int) -> None:
        """Begins to write a checkpoint of so many steps, once the one before is written.

        Raises UserError where the weights are not finite, or the one before could not be written.
        """
        self.written()
        if not all(self.task.ranks.gather(self._is_finite())):
            raise UserError(f"the weights are not finite after step {step}: lower `lr` or give `clip_grad=1`")
        self._begin(step)
        self.task.illustrate(self.run.path, step)

    def written(self) -> None:
        """Waits for the checkpoint that is being written. Raises UserError on all ranks where one could not do it."""
        _raise_first(self.task.ranks.gather(self._wait()))

    def _begin(self, step: int) -> None:
        """Copies what the checkpoint holds, and hands it to the thread: on the main rank, or where all have a shard."""
        self.log.sync()
        self.saved_step, self.saved_at = step, time.monotonic()
        task, ranks = self.task, self.ranks_of_thread
        if not (ranks.main or is_sharded(task.model)):
            return
        trainer = {"step": step, "optimizer": self.optimizer.state_dict(), "bad": self.unreadable}
        trainer |= {"images": task.source.fingerprint, "best": self.best.state(), "choices": choices.made()}
        trainer |= task.state()
        states = copied(task.model.state_dict()), copied(trainer)
        config, best = task.config, (self.best.step,) if self.best.step else ()
        what = (self.run.checkpoints, step, *states, Keep(config.keep_checkpoints, config.keep_every, best))
        sharded = is_sharded(task.model)
        write = (lambda: write_sharded_checkpoint(*what, ranks)) if sharded else (lambda: write_checkpoint(*what))
        # a daemon, so that a second signal ends the process at once
        self.writing = threading.Thread(target=self._write, args=(write,), daemon=True)
        self.writing.start()

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except UserError as error:
            self.failed = str(error)
        except Exception as error:
            self.failed = f"a checkpoint could not be written: {error!r}"

    def _wait(self) -> str | None:
        """Waits for the checkpoint that is being written; returns what went wrong, if anything."""
        if self.writing.ident is not None:
            self.writing.join()
        return self.failed

    def go_back_to(self, step: int) -> str:
        """Gives the model, after the last step, the weights that it had after a step whose checkpoint is kept.

        All ranks call it together. Returns what there is to say.
        """
        folder = self.run.checkpoints / folder_of(step)
        problem = self.task.ranks.by_main(lambda: damage(folder))
        if problem:
            return f"the best checkpoint, {folder}, is damaged, so the last one is exported: {problem}"
        restore(folder, self.task, self.optimizer)
        return f"exporting the weights of step {step}, the best by {self.best.monitor}: {self.best.value:.4f}"

    def _can_save_alone(self) -> bool:
        """Whether this rank can save without the others, which may no longer answer."""
        return not is_sharded(self.task.model) and self._is_finite()

    def _is_finite(self) -> bool:
        model = self.task.model
        return all(bool(local(value).isfinite().all()) for value in (*model.parameters(), *model.buffers()))

    @contextmanager
    def kept(self, progress: Progress) -> Iterator[None]:
        """What ends the block early is noted in train.log, and a checkpoint is saved of the steps that are done.

        A run that waits for images and is to stop ends by Interrupted. Where the block ends well, all checkpoints are
        written then.
        """
        try:
            yield
            self.written()
        except Interrupted:
            raise
        except (Exception, StoppedWaiting) as error:
            stopped, config = isinstance(error, StoppedWaiting), self.task.config
            names = [f.name for f in fields(config)]
            reason = as_flags(one_line(error), names) if isinstance(error, UserError) else repr(error)
            # each may fail as well, on a full disk, say, or where the weights are what is wrong
            with suppress(Exception):
                if self.task.ranks.world == 1 and progress.results:  # many processes can't do it together any more
                    progress.flush(progress.done, 0.0)
            with suppress(Exception):
                known = not (progress.results or self.withholding or isinstance(error, Diverged))
                if not self._wait() and known and progress.done > self.saved_step and self._can_save_alone():
                    self._begin(progress.done)
            with suppress(Exception):
                self.log.note("stopped while waiting for images" if stopped else reason)
            failed = self._wait()
            with suppress(Exception):
                if failed and failed != reason:
                    self.log.note(as_flags(failed, names))
            if not stopped:
                raise
            _raise_first([failed])
            self.log.say(to_go_on(config, self.saved_step))
            raise Interrupted from None


def to_go_on(config: RunConfig, step: int) -> str:
    """What a run that was stopped says."""
    return f"stopped at step {step}; to go on: sparse-fcmae {config.command} --resume --out {quote(config.out)}"


def _raise_first(problems: Iterable[str | None]) -> None:
    """Raises a UserError of the first text, if there is any."""
    for problem in problems:
        if problem:
            raise UserError(problem)


def check_images(run: RunFolder, task: Task) -> None:
    """Raises UserError where the newest checkpoint of a run was trained on other images."""
    checkpoint = newest_checkpoint(run.path)
    if checkpoint and read_json(checkpoint / META).get("images", task.source.fingerprint) != task.source.fingerprint:
        raise UserError(other_images(task))


def other_images(task: Task) -> str:
    """What is wrong where a task's images are not those of the run that it is to go on with."""
    config = task.config
    return (
        f"the images in {config.data} are not those that the run in {config.out} was started with: name these with "
        "`data`"
    )


def restore(
    checkpoint: Path, task: Task, optimizer: torch.optim.Optimizer, best: Best | None = None
) -> tuple[int, dict[str, str]]:
    """Has a task, its optimiser and its best evaluation go on from a checkpoint.

    Returns how many steps are done, and the unreadable images by name.

    Raises UserError where it is damaged, another model's, or one of a run on other images.
    """
    own = {"model": task.model.state_dict(), "optimizer": layout_of_moments(optimizer), **task.state()}
    model, trainer = read_checkpoint(checkpoint, own)
    if trainer["images"] != task.source.fingerprint:
        raise UserError(other_images(task))
    load_model(checkpoint, task.model, model)
    load_optimizer(optimizer, trainer["optimizer"])
    task.load_state(trainer)
    choices.take_up(trainer.get("choices", {}))
    if best:
        best.load_state(trainer.get("best", {}))
    return trainer["step"], trainer["bad"]
