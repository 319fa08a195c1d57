"""Checkpoints of a run: when they are saved, and all that a run needs to go on from one exactly."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_fcmae.runtime.checkpoint_folder import (
    LATEST,
    META,
    MODEL,
    TRAINER,
    checkpoints_in,
    folder_of,
    newest_checkpoint,
)
from sparse_fcmae.runtime.errors import Interrupted, UserError
from sparse_fcmae.runtime.files import (
    digest_of,
    new_folder,
    one_line,
    read_json,
    save_pickled,
    save_tensors,
    write_atomic,
    write_json,
    writing,
)
from sparse_fcmae.runtime.options import as_flags
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.optim import load_optimizer
from sparse_fcmae.training.progress import Diverged, Progress
from sparse_fcmae.training.schedule import Schedule
from sparse_fcmae.training.signals import StoppedWaiting
from sparse_fcmae.training.task import Task

ANOTHER = "delete its folder to go on from the one before"
LEAST_SECONDS = 60  # between checkpoints, where the user does not say how many steps


class Checkpoints:
    """Saves a run's checkpoints: after every so many steps that the user asked for, or about as often as is useful."""

    def __init__(
        self,
        run: RunFolder,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        log: RunLog,
        unreadable: dict[str, str],
        start: int,
    ) -> None:
        self.run, self.task, self.optimizer, self.schedule, self.log = run, task, optimizer, schedule, log
        self.unreadable = unreadable
        self.saved_step, self.saved_at = start, time.monotonic()

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
        at_interval = self.task.config.save_every and step % self.task.config.save_every == 0
        return bool(at_interval) or step == self.schedule.steps

    def due(self, step: int) -> bool:
        """Whether enough time has gone by, and enough steps where the user has asked for neither.

        Many processes can't agree on it, so there the main one is asked only when all of them write the log.
        """
        seconds = time.monotonic() - self.saved_at
        if minutes := self.task.config.save_minutes:
            return seconds >= 60 * minutes
        enough_steps = step - self.saved_step >= self.schedule.save_every
        return not self.task.config.save_every and enough_steps and seconds >= LEAST_SECONDS

    def save(self, step: int) -> None:
        """Saves a checkpoint of so many steps. Raises UserError where the weights are not finite."""
        model, task = self.task.model, self.task
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"the weights are not finite after step {step}: lower `lr` or give `clip_grad=1`")
        self.log.sync()
        trainer = {"step": step, "optimizer": self.optimizer.state_dict(), "bad": self.unreadable}
        trainer |= {"images": task.source.fingerprint, **task.state()}
        write_checkpoint(self.run.checkpoints, step, model.state_dict(), trainer, task.config.keep_checkpoints)
        task.illustrate(self.run.path, step)
        self.saved_step, self.saved_at = step, time.monotonic()

    @contextmanager
    def kept(self, progress: Progress) -> Iterator[None]:
        """What ends the block early is noted in train.log, and a checkpoint is saved of the steps that are done.

        A run that waits for images and is to stop ends by Interrupted.
        """
        try:
            yield
        except Interrupted:
            raise
        except (Exception, StoppedWaiting) as error:
            stopped, config = isinstance(error, StoppedWaiting), self.task.config
            names = (f.name for f in fields(config))
            reason = as_flags(one_line(error), names) if isinstance(error, UserError) else repr(error)
            # each may fail as well, on a full disk, say, or where the weights are what is wrong
            with suppress(Exception):
                if self.task.ranks.world == 1 and progress.results:  # many processes can't do it together any more
                    progress.flush(progress.done, 0.0)
            with suppress(Exception):
                worth_it = progress.done > self.saved_step and not progress.results and not isinstance(error, Diverged)
                if self.task.ranks.main and worth_it:
                    self.save(progress.done)
            with suppress(Exception):
                self.log.note("stopped while waiting for images" if stopped else reason)
            if not stopped:
                raise
            self.log.say(to_go_on(config, self.saved_step))
            raise Interrupted from None


def to_go_on(config: RunConfig, step: int) -> str:
    """What a run that was stopped says."""
    return f"stopped at step {step}; to go on: sparse-fcmae {config.command} --resume --out {quote(config.out)}"


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


def restore(checkpoint: Path, task: Task, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, str]]:
    """Has a task and its optimiser go on from a checkpoint: the steps that are done, and the unreadable images by name.

    Raises UserError where it is damaged, another model's, or one of a run on other images.
    """
    trainer = load_trainer(checkpoint)
    if trainer["images"] != task.source.fingerprint:
        raise UserError(other_images(task))
    load_model(checkpoint, task.model)
    load_optimizer(optimizer, trainer["optimizer"])
    task.load_state(trainer)
    return trainer["step"], trainer["bad"]


def write_checkpoint(
    checkpoints: Path, step: int, model: dict[str, Tensor], trainer: dict[str, Any], keep: int
) -> None:
    """Writes the checkpoint of a step into a run's folder of checkpoints, and names it the latest.

    model: the state dict. trainer: what else the run needs, of tensors and plain values. All but the last `keep`
    checkpoints up to this step are deleted.
    """
    folder = checkpoints / folder_of(step)
    with new_folder(folder) as temporary, writing(folder):
        save_tensors(model, temporary / MODEL)
        save_pickled(trainer, temporary / TRAINER)
        written = [temporary / name for name in (MODEL, TRAINER)]
        sizes = {path.name: path.stat().st_size for path in written}
        digests = {path.name: digest_of(path) for path in written}
        write_json(temporary / META, {"step": step, "bytes": sizes, "sha256": digests, "images": trainer["images"]})
    write_atomic(checkpoints / LATEST, lambda p: p.write_text(folder.name + "\n"))
    so_far = [path for path in checkpoints_in(checkpoints.parent) if path.name <= folder.name]
    for old in so_far[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """Loads the weights of the whole model. Raises UserError where they are damaged or another model's."""
    try:
        model.load_state_dict(load_file(checkpoint / MODEL))
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {MODEL}: {error}; {ANOTHER}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {checkpoint} is of another model: {reason}; {ANOTHER}") from None


def load_trainer(checkpoint: Path) -> dict[str, Any]:
    """What else a run needs to go on, its tensors on the CPU. Raises UserError where it is damaged."""
    try:
        found = torch.load(checkpoint / TRAINER, map_location="cpu", weights_only=True)
        if lacking := {"step", "optimizer", "bad", "images"} - set(found):
            raise ValueError(f"it lacks {min(lacking)}")
        return found
    except Exception as error:  # torch.load raises many types on a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"checkpoint {checkpoint} is damaged: {TRAINER}: {reason}; {ANOTHER}") from None
