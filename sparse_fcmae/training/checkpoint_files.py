"""What a checkpoint has on the disk: written whole by the main process, or in parts by all, and read by either.

RUN/checkpoints/step-00000100/{model.safetensors, trainer.pt, meta.json}. Where the ranks have a shard each, shards/
stands in place of model.safetensors and has all sharded tensors of trainer.pt as well, under the names of their places.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_fcmae.runtime.checkpoint_folder import (
    LATEST,
    META,
    MODEL,
    SHARDS,
    TRAINER,
    checkpoints_in,
    folder_of,
    step_of,
)
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import (
    digest_of,
    new_folder,
    save_pickled,
    save_tensors,
    write_atomic,
    write_json,
    writing,
)
from sparse_fcmae.runtime.shards import laid_out, load_shards, save_shards

ANOTHER = "delete its folder to go on from the one before"
State = dict[str, Any]  # nested dictionaries of tensors and plain values


class Keep(NamedTuple):
    """Which checkpoints stay: so many of the newest, each whose step `every` divides, and those of some steps."""

    newest: int
    every: int | None = None
    steps: tuple[int, ...] = ()


def copied(value: Any) -> Any:
    """A nested state with all tensors copied to the CPU, which later steps leave as they are."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    if value.is_cuda and not isinstance(value, DTensor):  # pinned memory takes it ten times as fast, and is kept
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach())
    return value.detach().to("cpu", copy=True)


def write_checkpoint(checkpoints: Path, step: int, model: State, trainer: State, keep: Keep) -> None:
    """Writes the checkpoint of a step into a run's folder of checkpoints, and names it the latest.

    model: the state dict. trainer: what else the run needs, of tensors and plain values. Of the checkpoints up to this
    step, those are deleted that need not be kept.
    """
    folder = checkpoints / folder_of(step)
    with new_folder(folder) as temporary, writing(folder):
        save_tensors(model, temporary / MODEL)
        save_pickled(trainer, temporary / TRAINER)
        _describe(temporary, step, trainer, _sizes_and_digests(temporary, MODEL, TRAINER))
    _name_latest(folder, keep)


def write_sharded_checkpoint(
    checkpoints: Path, step: int, model: State, trainer: State, keep: Keep, ranks: Ranks
) -> None:
    """The same of states with DTensors, which all ranks call together. Where it fails in one, it fails in all."""
    folder, shards = checkpoints / folder_of(step), {}
    trainer = _without_shards({"model": model, **trainer}, "", shards)
    with ExitStack() as stack:
        temporary = ranks.by_main(lambda: stack.enter_context(new_folder(folder)))
        save_shards(shards, temporary / SHARDS, ranks.group)

        def finish() -> None:
            with writing(folder):
                save_pickled(trainer, temporary / TRAINER)
                files = [f"{SHARDS}/{path.name}" for path in sorted((temporary / SHARDS).iterdir())]
                _describe(temporary, step, trainer, _sizes_and_digests(temporary, TRAINER, *files))

        ranks.by_main(finish)
    if ranks.main:
        _name_latest(folder, keep)


def read_checkpoint(checkpoint: Path, own: State) -> tuple[State, State]:
    """The model's state dict and the trainer's state in a checkpoint of either kind.

    own: the run's states, {"model": ..., ...}. What is a DTensor in them comes as one, laid out alike; the rest comes
    whole, on the CPU. Raises UserError where the checkpoint is damaged.
    """
    trainer, like = load_trainer(checkpoint), {}
    _without_shards(own, "", like)
    if (checkpoint / SHARDS).is_dir():
        shards = load_shards(checkpoint / SHARDS, like)
        trainer = _with_shards(trainer, "", shards)
        return trainer.pop("model"), trainer
    try:
        model = load_file(checkpoint / MODEL)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: {MODEL}: {error}; {ANOTHER}") from None
    trainer = _laid_out({"model": model, **trainer}, "", like)
    return trainer.pop("model"), trainer


def load_model(checkpoint: Path, model: nn.Module, state: State) -> None:
    """Gives a model the state dict of a checkpoint. Raises UserError where it is another model's."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"checkpoint {checkpoint} is of another model: {reason}; {ANOTHER}") from None


def load_trainer(checkpoint: Path) -> State:
    """What else a run needs to go on, its tensors on the CPU. Raises UserError where it is damaged."""
    try:
        found = torch.load(checkpoint / TRAINER, map_location="cpu", weights_only=True)
        if lacking := {"step", "optimizer", "bad", "images"} - set(found):
            raise ValueError(f"it lacks {min(lacking)}")
        return found
    except Exception as error:  # torch.load raises many types on a damaged file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"checkpoint {checkpoint} is damaged: {TRAINER}: {reason}; {ANOTHER}") from None


def _sizes_and_digests(folder: Path, *names: str) -> State:
    return {
        "bytes": {name: (folder / name).stat().st_size for name in names},
        "sha256": {name: digest_of(folder / name) for name in names},
    }


def _describe(folder: Path, step: int, trainer: State, files: State) -> None:
    """Writes meta.json, with which a checkpoint counts as whole."""
    best = trainer.get("best", {}).get("step")
    write_json(folder / META, {"step": step, **files, "images": trainer["images"], "best": best})


def _name_latest(folder: Path, keep: Keep) -> None:
    """Names a checkpoint the latest, and deletes those up to it that need not be kept."""
    write_atomic(folder.parent / LATEST, lambda p: p.write_text(folder.name + "\n"))
    so_far = [path for path in checkpoints_in(folder.parent.parent) if step_of(path) <= step_of(folder)]
    for old in so_far[keep.newest :]:
        if step_of(old) not in keep.steps and not (keep.every and step_of(old) % keep.every == 0):
            shutil.rmtree(old, ignore_errors=True)


def _without_shards(value: Any, name: str, shards: dict[str, Tensor]) -> Any:
    """A nested state with None for each DTensor, all of which go into `shards` by the names of their places."""
    if isinstance(value, DTensor):
        shards[name] = value
        return None
    if isinstance(value, dict):
        return {key: _without_shards(part, _place(name, key), shards) for key, part in value.items()}
    return value


def _with_shards(value: Any, name: str, shards: dict[str, Tensor]) -> Any:
    """The inverse of `_without_shards`."""
    if isinstance(value, dict):
        return {key: _with_shards(part, _place(name, key), shards) for key, part in value.items()}
    return shards.get(name, value)


def _laid_out(value: Any, name: str, like: dict[str, Tensor]) -> Any:
    """A nested state with the tensors as `laid_out` has them."""
    if isinstance(value, dict):
        return {key: _laid_out(part, _place(name, key), like) for key, part in value.items()}
    return laid_out(value, like.get(name)) if isinstance(value, Tensor) else value


def _place(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)
