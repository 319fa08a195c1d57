"""What the folder of a run holds, and which folders are refused before anything in them is lost.

RUN/config.json  metrics.jsonl  evaluations.jsonl  train.log  events.out.tfevents.*  trackers.json
RUN/checkpoints/            as `checkpoint_folder` says
RUN/exported/{model.safetensors, config.json}   dense encoder or classifier
and what the task makes beside these, such as loss.png or reconstructions/step-00000100.png
"""

import shutil
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sparse_fcmae.runtime.checkpoint_folder import CHECKPOINTS
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import leftover_of, read_json, write_json, writing
from sparse_fcmae.runtime.lock import LOCK, lock_folder

CONFIG = "config.json"
PARTS = (  # of every run; a task has further ones
    "metrics.jsonl",
    "evaluations.jsonl",
    "train.log",
    "events.out.tfevents.*",
    "trackers.json",
    "lr-range.png",
    "report.html",
    "evaluation",
    "analysis",
    CHECKPOINTS,
    "exported",
)
OF_TRACKERS = ("wandb",)  # what a tracker leaves where a run does not begin, as another one can't be reached
RENAMED = {"every": "eval_every"}  # options under the names that earlier versions wrote into config.json


class RunFolder:
    """The folder of a run of a task, such as "pretraining". Constructing it touches nothing on the disk."""

    def __init__(self, path: str | Path, task: str) -> None:
        self.path, self.task, self.format = Path(path), task, f"sparse-fcmae {task} run"
        self.checkpoints = self.path / CHECKPOINTS

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises UserError where the folder can't be used as asked."""
        if resume and overwrite:
            raise UserError("`resume` and `overwrite` exclude each other: give one")
        with writing(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"`out` {self.path} is a file: choose another")
            names = [p.name for p in self.path.iterdir()] if self.path.exists() else []
            empty = all(name in (LOCK, *OF_TRACKERS) or leftover_of(name) == CONFIG for name in names)
        is_run = not empty and self.saved_options() is not None
        if resume and not is_run:
            raise UserError(f"`out` {self.path} holds no {self.task} run to resume: leave `resume` out to start one")
        if not empty and not is_run:
            raise UserError(f"`out` {self.path} is not empty and holds no {self.task} run: choose another")
        if not empty and not (resume or overwrite):
            raise UserError(
                f"`out` {self.path} holds a run: give `resume=True` to go on or `overwrite=True` to delete it"
            )

    def saved_options(self) -> dict[str, Any] | None:
        """The options that the run was started with, or None where the folder is no run's."""
        path = self.path / CONFIG
        saved = read_json(path) if path.is_file() else None
        if not isinstance(saved, dict) or saved.pop("format", None) != self.format:
            return None
        return {RENAMED.get(name, name): value for name, value in saved.items()}

    def hold(self, config: Any) -> None:
        """Makes the folder and keeps other processes out of it, until this object or the process is gone.

        Raises UserError where another process is training there, or has changed what `check` found.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.path)
        self.check(config.resume, config.overwrite)

    def begin(self, config: Any, outputs: tuple[str, ...], **beside: Any) -> None:
        """Writes the config, with `beside` next to the options, into the folder that is held.

        Where the config says `overwrite`, an earlier run's files are deleted, else only what a killed process left half
        written. outputs: the files and folders that the task makes beside PARTS.
        """
        parts = (*outputs, *PARTS)
        with writing(self.path):
            for path in [*self.path.iterdir(), *(p for part in parts for p in self.path.glob(f"{part}/.*"))]:
                name = leftover_of(path.name)
                if name and (path.parent != self.path or any(fnmatch(name, part) for part in (*parts, CONFIG))):
                    _delete(path)
            for part in parts if config.overwrite else ():
                for path in self.path.glob(part):
                    _delete(path)
        options = {k: v for k, v in asdict(config).items() if k not in ("config", "resume", "overwrite")}
        write_json(self.path / CONFIG, {"format": self.format, **options, **beside})
        with writing(self.path):
            self.checkpoints.mkdir(exist_ok=True)


def _delete(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
