"""The folders of a run's checkpoints: which there are, and which of them are whole.

RUN/checkpoints/step-00000100/{model.safetensors, trainer.pt, meta.json}, or shards/ in place of model.safetensors where
several processes had a part of the model each. meta.json has the sizes and the SHA-256 of the other files; checkpoints
of earlier versions have the sizes alone. RUN/checkpoints/latest names the newest, for people and other programs. A run
goes on from the newest that is whole, whatever it says.
"""

import re
from functools import lru_cache
from pathlib import Path

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import digest_of, one_line, read_json

MODEL, SHARDS, TRAINER, META, LATEST = "model.safetensors", "shards", "trainer.pt", "meta.json", "latest"
CHECKPOINTS, EXPORTED = "checkpoints", "exported"
STEP = re.compile(r"step-(\d{8,})")


def folder_of(step: int) -> str:
    """The name of the folder with the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of the checkpoint in a folder."""
    return int(STEP.fullmatch(folder.name)[1])


def checkpoints_in(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the newest first, be they whole or not."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def weights_in(checkpoint: Path) -> Path:
    """The file with a checkpoint's weights, or the folder with their shards."""
    return checkpoint / (SHARDS if (checkpoint / SHARDS).is_dir() else MODEL)


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of a run's newest whole checkpoint, or None where it has saved none yet.

    Raises UserError where there are checkpoints, and all of them are damaged.
    """
    folders = checkpoints_in(run)
    for folder in folders:
        if damage(folder) is None:
            return folder
    if folders:
        raise UserError(
            f"{run / CHECKPOINTS} has no whole checkpoint, {folders[0].name} for one: {damage(folders[0])}: put one "
            "back from a copy, or start anew with `overwrite=True`"
        )
    return None


def best_checkpoint(run: Path) -> Path | None:
    """The folder of a run's best checkpoint, where it looks for one and that is whole; else of its newest."""
    newest = newest_checkpoint(run)
    best = read_json(newest / META).get("best") if newest else None
    folder = newest.with_name(folder_of(best)) if best else newest
    return folder if folder is None or damage(folder) is None else newest


def is_exported(run: Path) -> bool:
    """Whether a run has written its weights for their users since it wrote its newest checkpoint."""
    exported, newest = _written(run / EXPORTED / MODEL), next(iter(checkpoints_in(run)), None)
    return exported > 0 and (newest is None or exported >= _written(newest / META))


def _written(path: Path) -> float:
    """When a file was written, 0 where there is none."""
    return path.stat().st_mtime if path.exists() else 0.0


def damaged_checkpoints(run: Path) -> list[str]:
    """A line for each checkpoint of a run that is newer than its newest whole one, with what is wrong with it."""
    lines = []
    for folder in checkpoints_in(run):
        reason = damage(folder)
        if reason is None:
            break
        lines.append(f"checkpoint {folder} is damaged and left out: {reason}")
    return lines


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's folder, or None where its files are those that were written."""
    try:
        status = {name: (folder / name).stat() for name in (META, TRAINER)}
        meta = read_json(folder / META)
        sizes, digests = dict(meta["bytes"]), dict(meta.get("sha256", {}))
        names = [name for name in sizes if name != TRAINER and Path(name).parts[0] == SHARDS] or [MODEL]
        status |= {name: (folder / name).stat() for name in names}
    except OSError as error:
        return f"{Path(error.filename).relative_to(folder)}: {error.strerror}"
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        return f"{META} is no whole one: {one_line(error)}"
    for name in (TRAINER, *names):
        if status[name].st_size != sizes.get(name):
            return f"{name} has {status[name].st_size} bytes and not {sizes.get(name)}"
        try:
            if name in digests and _digest(folder.resolve() / name, status[name].st_mtime_ns) != digests[name]:
                return f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} can't be read: {error.strerror}"
    return None


@lru_cache(maxsize=1024)
def _digest(file: Path, written: int) -> str:
    """The SHA-256 of a file, found out once for each time at which it was written."""
    return digest_of(file)
