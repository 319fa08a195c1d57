"""From what a user names to the tensors in it: a file is found, or downloaded, loaded and unwrapped.

Nothing is unpickled but tensors and plain values. In the place of any other object stands an empty one.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_fcmae.data.decoders.image import library
from sparse_fcmae.runtime.checkpoint_folder import META, SHARDS, best_checkpoint, damage, weights_in
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line
from sparse_fcmae.weights.adapter import CONFIG, entry
from sparse_fcmae.weights.adapters import ADAPTERS

# The files with weights that a folder may hold, by preference. The last one is what older libraries wrote.
FILES = [*dict.fromkeys(adapter.weights_file for adapter in ADAPTERS), "pytorch_model.bin"]
WRAPPERS = ("model", "state_dict", "module", "model_state_dict")  # keys under which trainers keep the weights
MOST_WRAPPERS = 8  # around each other; a dictionary that holds itself would have no end
MOST_NAMED = 10  # of what is left out, in a note
NAMED = re.compile(r"(timm|hf):([\w.-]+(?:/[\w.-]+)?)$")  # public weights: a model of timm's, a repository on the hub


class Foreign:
    """Stands where a file has an object whose class is not PyTorch's. It takes what it is given, and does nothing."""

    def __new__(cls, *values: Any) -> "Foreign":
        return object.__new__(cls)

    def __init__(self, *values: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def plain_dict(*values: Any) -> dict[Any, Any]:
    """Stands for a kind of dictionary, which is then filled."""
    return {}


def plain_list(*values: Any) -> list[Any]:
    """Stands for a kind of list."""
    return []


PLAIN = {"collections.defaultdict": plain_dict, "collections.deque": plain_list}


def weights_file(path: Path, whole: bool = False) -> Path:
    """The file with the weights in what a user names, or the folder with their shards.

    path: a file, a folder, or a name of public weights such as "timm:convnextv2_tiny.fcmae" or
    "hf:facebook/convnextv2-tiny-22k-224". whole: as in `read_weights`.
    """
    if not path.exists() and (public := NAMED.match(str(path))):
        path = _downloaded(*public.groups())
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    if (path / META).is_file() and (reason := damage(path)):
        raise UserError(f"checkpoint {path} is damaged: {reason}: take another")
    if whole and (checkpoint := best_checkpoint(path)):
        return weights_in(checkpoint)
    if (path / SHARDS).is_dir():
        return path / SHARDS
    for folder in (path, path / "exported"):
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    if (path / f"{FILES[0]}.index.json").is_file():
        raise UserError(f"{path} holds weights in several files: save them in one, with a larger max_shard_size")
    if checkpoint := best_checkpoint(path):
        return weights_in(checkpoint)
    raise UserError(f"{path} holds no {', '.join(FILES)}, exported encoder or checkpoint")


def _downloaded(of: str, name: str) -> Path:
    """The folder in which the hub's own library keeps a repository with weights, which it downloads where need be.

    of: "timm" for one of timm's models, whose repository timm knows, or "hf" for a repository itself.
    """
    if of == "timm":
        try:
            repository = entry("timm.models", "get_pretrained_cfg")(name, allow_unregistered=False).hf_hub_id
        except (RuntimeError, AttributeError):
            repository = None
        if not repository:
            raise UserError(f"timm:{name}: timm has no such weights: see timm.list_pretrained('convnextv2*')")
    else:
        repository = name
    try:
        hub = library("huggingface_hub", "remote")
        files = [*FILES, f"{FILES[0]}.index.json", CONFIG, "preprocessor_config.json"]
        return Path(hub.snapshot_download(repository, allow_patterns=files))
    except OSError as error:  # no network, no such repository, no library
        raise UserError(f"{of}:{name} can't be downloaded from {repository}: {one_line(error)[:300]}") from None
    except ValueError as error:  # no name of a repository
        raise UserError(f"{of}:{name} is no repository: {one_line(error)[:300]}") from None


def load(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in a file of weights, or in a folder of shards, by name, and notes on what was left out."""
    if file.name == SHARDS:
        from sparse_fcmae.runtime.shards import load_shards  # takes half a second

        found = load_shards(file, {}, prefix="model.")
        return unwrap({name.removeprefix("model."): tensor for name, tensor in found.items()}, file)
    try:
        if file.suffix == ".safetensors":
            return unwrap(load_file(file), file)
        content, notes = _load_pickled(file)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"needs {name[1]} to be read, that is code: refused" if name else "can't be read as a PyTorch file"
        if Foreign.__name__ in str(error):  # of a kind of list or dictionary, which an empty object can't be
            what = "holds an object beside the tensors that is filled piece by piece, and can't be passed over"
        raise UserError(f"{file} {what}; save the state_dict alone, as safetensors or by torch.save") from None
    except Exception as error:  # safetensors, zipfile and the unpickler raise many types on a damaged file
        kind = "safetensors" if file.suffix == ".safetensors" else "a PyTorch file"
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(f"{file} can't be read as {kind} ({reason}): is it whole, and what its name says?") from None
    tensors, more = unwrap(content, file)
    return tensors, notes + more


def _load_pickled(file: Path) -> tuple[Any, list[str]]:
    """What `torch.save` wrote, without a call of anything but PyTorch's own, and a note on what else it names."""
    known = [argparse.Namespace]  # the official code's options: values, no code
    with warnings.catch_warnings(), torch.serialization.safe_globals(known):
        warnings.simplefilter("ignore")  # the unpickler's, on protocols that it then refuses
        try:
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        except Exception:  # of PyTorch before 1.6, or damaged: what is to be said of it, loading says
            foreign = []
        stand_ins = [(PLAIN.get(name, Foreign), name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(file, map_location="cpu", weights_only=True)
    foreign = [name for name in foreign if name not in PLAIN]
    what = "left out objects of foreign classes, whose code was not run"
    return content, [f"{what}: {listed(foreign)}"] if foreign else []


def unwrap(found: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, out of what trainers wrap them in, and notes on what lay beside them."""
    notes: list[str] = []
    wrappers = 0
    while isinstance(found, dict) and (inner := next((k for k in WRAPPERS if _holds_tensors(found.get(k))), None)):
        if wrappers == MOST_WRAPPERS:
            raise UserError(f"{file} wraps its tensors more than {MOST_WRAPPERS} times: save the state_dict alone")
        wrappers += 1
        if beside := [key for key in found if key != inner]:
            notes.append(f"left out what lies beside {inner!r} in the file: {listed(beside)}")
        found = found[inner]
    values = found.items() if isinstance(found, dict) else ()
    tensors = {key: value for key, value in values if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no state_dict: it needs tensors by name, bare or under {', '.join(WRAPPERS)}")
    if others := [key for key in found if key not in tensors]:
        notes.append(f"left out what is no tensor with a name: {listed(others)}")
    return tensors, notes


def _holds_tensors(value: Any, wrappers: int = 0) -> bool:
    """Whether tensors lie in a dictionary, or in what it wraps; one that has no end may as well hold some."""
    if not isinstance(value, dict) or wrappers > MOST_WRAPPERS:
        return isinstance(value, dict)
    held = any(isinstance(inner, Tensor) for inner in value.values())
    return held or any(_holds_tensors(value.get(key), wrappers + 1) for key in WRAPPERS)


def listed(keys: Collection[Any]) -> str:
    """Keys in a file, for a note."""
    names = sorted(shown(key) if isinstance(key, str) else f"a {type(key).__name__}" for key in keys)
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def shown(name: str) -> str:
    """A name in a file, for a line on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in name[:200])
