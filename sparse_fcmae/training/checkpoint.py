"""The run folder: what is refused, what is written, and checkpoints that are valid or not there.

RUN/config.json  metrics.jsonl  train.log  loss.png
RUN/checkpoints/step-00000100/{model.safetensors, trainer.pt, meta.json}   valid only once meta.json is there
RUN/checkpoints/latest      name of the newest valid one
RUN/exported/{model.safetensors, config.json}   dense encoder
RUN/reconstructions/step-00000100.png
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_fcmae.config import PretrainConfig, RunConfig, differences, flag
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import new_folder, read_json, save_pickled, save_tensors, write_atomic, write_json, writing

MODEL, TRAINER, META, LOCK = "model.safetensors", "trainer.pt", "meta.json", ".lock"
ENDS = ("tmp", "old")  # of the temporary names in `files`
PARTS = (
    *("metrics.jsonl", "evaluations.jsonl", "train.log", "events.out.tfevents.*", "loss.png", "accuracy.png"),
    *("checkpoints", "exported", "exported-ema", "reconstructions", "config.json"),
)


class RunFolder:
    """A run's folder on disk, of pretraining or of what else `kind` configures. Constructing it touches nothing."""

    def __init__(self, path: str | Path, kind: type[RunConfig] = PretrainConfig) -> None:
        self.path, self.kind, self.format = Path(path), kind.command, f"sparse-fcmae {kind.command} run"
        self.checkpoints = self.path / "checkpoints"

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raises UserError where the folder can't be used as asked."""
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other: give one")
        with writing(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"--out {self.path} is a file: choose another")
            empty = not self.path.exists() or not {p.name for p in self.path.iterdir()} - {LOCK}
        is_run = not empty and self.saved_config() is not None
        if resume and not is_run:
            raise UserError(f"--out {self.path} holds no {self.kind} run to resume: leave --resume out to start one")
        if not empty and not is_run:
            raise UserError(f"--out {self.path} is not empty and holds no {self.kind} run: choose another")
        if not empty and not (resume or overwrite):
            raise UserError(f"--out {self.path} holds a run: give --resume to go on or --overwrite to delete it")

    def saved_config(self) -> dict[str, Any] | None:
        """The options that the run was started with; None where this is no run's folder."""
        path = self.path / "config.json"
        saved = read_json(path) if path.is_file() else None
        if not isinstance(saved, dict) or saved.pop("format", None) != self.format:
            return None
        return saved

    def begin(self, config: RunConfig, **more: Any) -> None:
        """Makes the folder, keeps other processes out of it, and writes the config, with `more` beside the options.

        An earlier run's files are deleted if so asked, else only what a killed process left half-written. Raises
        UserError where another process is training there.
        """
        half_written = [f"{folder}.*.{end}" for folder in ("", "checkpoints/", "reconstructions/") for end in ENDS]
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            for pattern in (*half_written, *(PARTS if config.overwrite else ())):
                for part in self.path.glob(pattern):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
        options = {k: v for k, v in asdict(config).items() if k not in ("resume", "overwrite")}
        write_json(self.path / "config.json", {"format": self.format, **options, **more})
        with writing(self.path):
            self.checkpoints.mkdir(exist_ok=True)

    def _lock(self) -> None:
        """Holds a lock until this object or the process is gone."""
        if fcntl is None:
            return
        self._held = (self.path / LOCK).open("w")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not shared with forked workers
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out {self.path} is in use by another process: wait for it or choose another") from None
        except OSError:  # a file system without locks
            return

    def save(self, step: int, model: dict[str, Tensor], trainer: dict[str, Any], keep: int) -> None:
        """Writes the checkpoint of a step, names it the latest, and deletes all but the last `keep` up to it."""
        folder = self.checkpoints / f"step-{step:08d}"
        with new_folder(folder) as temporary, writing(folder):
            save_tensors(model, temporary / MODEL)
            save_pickled(trainer, temporary / TRAINER)
            sizes = {name: (temporary / name).stat().st_size for name in (MODEL, TRAINER)}
            write_json(temporary / META, {"step": step, "bytes": sizes})
        write_atomic(self.checkpoints / "latest", lambda p: p.write_text(folder.name + "\n"))
        so_far = sorted(p for p in self.checkpoints.glob("step-*") if p.name <= folder.name)
        for old in so_far[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest checkpoint's folder; None where there is none yet. Raises UserError where it is damaged."""
        pointer = self.checkpoints / "latest"
        if not pointer.exists():
            return None
        folder = self.checkpoints / pointer.read_text().strip()
        check_whole(folder)
        return folder


def check_whole(folder: Path) -> None:
    """Raises UserError unless a checkpoint folder holds its files at their full sizes."""
    if not (folder / META).is_file():
        raise UserError(f"{folder} is no checkpoint: {META} is missing")
    for name, size in read_json(folder / META)["bytes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise UserError(f"checkpoint {folder} is damaged: {name} is missing or truncated; {_earlier(folder)}")


def load_model(folder: Path, model: nn.Module) -> None:
    """Loads the whole model's weights in a checkpoint."""
    try:
        model.load_state_dict(load_file(folder / MODEL))
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {MODEL}: {error}; {_earlier(folder)}") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {folder} is of another model: {reason}; {_earlier(folder)}") from None


def load_trainer(folder: Path) -> dict[str, Any]:
    """The optimiser's state and what else a run needs to go on, on the CPU."""
    try:
        return torch.load(folder / TRAINER, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on a damaged file
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {folder} is damaged: {TRAINER}: {reason}; {_earlier(folder)}") from None


def _earlier(folder: Path) -> str:
    others = [p.name for p in sorted(folder.parent.glob("step-*")) if p.name < folder.name]
    if not others:
        return "there is no earlier one, start the run anew with --overwrite"
    return f"to go on from the one before, write {others[-1]} into {folder.parent / 'latest'}"


def check_same(config: RunConfig, saved: RunConfig) -> None:
    """Raises UserError where a run would be resumed with another model, data order or recipe."""
    for name in differences(config, saved):
        raise UserError(
            f"{flag(name)} is {getattr(config, name)} but the run in {config.out} has {getattr(saved, name)}: "
            "leave it out to resume, or start another run with another --out"
        )
