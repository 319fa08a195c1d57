"""Reads the weights of any checkpoint of ConvNeXt V2, with nothing unpickled but tensors.

A file is found, loaded, unwrapped, recognised by the names in it, renamed to the official names, and checked against
the model of its size.
"""

import argparse
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_fcmae.data.transform import Transform
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.convnext import SparseEncoder, name_of
from sparse_fcmae.runtime.checkpoint_folder import (
    META,
    SHARDS,
    STEP,
    best_checkpoint,
    damage,
    damaged_checkpoints,
    weights_in,
)
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, read_json
from sparse_fcmae.weights.adapter import CONFIG, Adapter, Settings
from sparse_fcmae.weights.adapters import ADAPTERS
from sparse_fcmae.weights.weights import DECODER, Weights, patch_size_of

# The files with weights that a folder may hold, by preference. The last one is what older libraries wrote.
FILES = [*dict.fromkeys(adapter.weights_file for adapter in ADAPTERS), "pytorch_model.bin"]
WRAPPERS = ("model", "state_dict", "module", "model_state_dict")  # keys under which trainers keep the weights
MOST_WRAPPERS = 8  # around each other; a dictionary that holds itself would have no end
PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")  # of DistributedDataParallel, torch.compile and trainers
INSIDE_A_MODEL = re.compile(r"(^|\.)encoder\.downsample")  # the names of an encoder in a model for pretraining


def load_encoder(path: str | Path, *, backend: str = "auto") -> SparseEncoder:
    """An encoder with the weights of any checkpoint that `read_weights` reads, in evaluation mode."""
    return read_weights(path).encoder(backend)


def load_classifier(path: str | Path, *, backend: str = "auto") -> Classifier:
    """A classifier with the weights of any checkpoint that `read_weights` reads, in evaluation mode.

    Raises UserError where it has no head.
    """
    return read_weights(path).classifier(backend)


def load_transform(path: str | Path, crop_fraction: float | None = None) -> Transform:
    """What makes of an image's file the image that the model of a checkpoint takes: float32 [C, H, W], normalised.

    path: as in `read_weights`. crop_fraction: as in `CentreView`; None for what suits the size or, where the model was
    trained on native windows, for the window in the middle.
    """
    return read_weights(path).transform(crop_fraction)


def read_weights(path: str | Path, *, whole: bool = False) -> Weights:
    """The weights in a checkpoint.

    path: a folder that `pretrain` or `finetune` made, one of its checkpoints or exports, a folder of timm or Hugging
    Face, or a .safetensors, .pt, .pth or .bin file. whole: take a checkpoint of a run, which has the decoder, and not
    what was exported: the best where it looks for one, else the newest.

    The layout is recognised by the names, the size by the shapes. Raises UserError, in one line, for what is missing,
    unknown, of a wrong shape, truncated, or holds code.
    """
    file = weights_file(Path(path), whole)
    found = understand(_load(file), file)
    if STEP.fullmatch(file.parent.name) and file.parent != Path(path):
        found = replace(found, notes=(*found.notes, *damaged_checkpoints(Path(path))))
    return found


def weights_file(path: Path, whole: bool = False) -> Path:
    """The file with the weights in what a user names, or the folder with their shards; `whole` as in `read_weights`."""
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


def _load(file: Path) -> Any:
    """What a file of weights holds, or a folder of shards."""
    if file.name == SHARDS:
        from sparse_fcmae.runtime.shards import load_shards  # takes half a second

        found = load_shards(file, {}, prefix="model.")
        return {name.removeprefix("model."): tensor for name, tensor in found.items()}
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the official code's options: values, no code
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = str(error).partition("GLOBAL ")[2].split()
        what = f"needs {name[0]} to be read, that is code: refused" if name else "can't be read as a PyTorch file"
        raise UserError(f"{file} {what}; save the state_dict alone, as safetensors or by torch.save") from None
    except Exception as error:  # safetensors, zipfile and the unpickler raise many types on a damaged file
        kind = "safetensors" if file.suffix == ".safetensors" else "a PyTorch file"
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(f"{file} can't be read as {kind} ({reason}): is it whole, and what its name says?") from None


def understand(found: Any, file: Path) -> Weights:
    """The weights in what a file was found to hold: `read_weights` without the reading."""
    tensors, notes = _unwrap(found, file)
    adapter, named = _recognise(tensors, file)
    shape = _infer_architecture(named, adapter, file)
    state = _official(named, adapter, shape, file)
    if "head.weight" not in state and _ends_in_identity(state):
        del state["norm.weight"], state["norm.bias"]
        notes.append("left out the final norm: it is the identity, as pretraining does not train it")
    settings, configs = read_settings(file)
    if settings.in_chans not in (None, shape["in_chans"]):
        raise UserError(f"{file} takes {shape['in_chans']} channels, its {CONFIG} says {settings.in_chans}")
    image_size, classes, form = settings.image_size, settings.classes, settings.form
    if form and form.in_chans != shape["in_chans"]:
        notes.append(f"left out the statistics: {form.in_chans} channels have one, the stem takes {shape['in_chans']}")
        form = None
    if any(side % patch_size_of(shape) for side in image_size):
        height, width = image_size
        notes.append(f"left out the image size {height}x{width}, which is no multiple of the patch: 224 instead")
        image_size = (224, 224)
    if classes and len(classes) != len(state.get("head.weight", ())):
        classes = None
    return Weights(
        state=state,
        architecture=shape | {"image_size": image_size, "grn_scope": settings.grn_scope},
        classes=classes,
        known_form=form,
        layout=adapter.name,
        sparse=adapter.sparse or "mask_token" in state or any(map(INSIDE_A_MODEL.search, tensors)),
        original=named,
        config=configs.get(adapter.name),
        notes=tuple(notes),
    )


def _unwrap(found: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, out of what trainers wrap them in, and a note on what lay beside them."""
    notes = []
    while isinstance(found, dict) and (inner := next((k for k in WRAPPERS if isinstance(found.get(k), dict)), None)):
        if len(notes) == MOST_WRAPPERS:
            raise UserError(f"{file} wraps its tensors more than {MOST_WRAPPERS} times: save the state_dict alone")
        names = (_shown(key) if isinstance(key, str) else f"a {type(key).__name__}" for key in found if key != inner)
        beside = ", ".join(sorted(names))
        notes.append(f"left out what lies beside {inner!r} in the file: {beside}" if beside else "")
        found = found[inner]
    named = isinstance(found, dict) and found and all(isinstance(key, str) for key in found)
    if not named or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} holds no state_dict: it needs tensors by name, bare or under {', '.join(WRAPPERS)}")
    for name, value in found.items():
        if what := _unfit(value):
            raise UserError(f"{file}: {_shown(name)} {what}: weights are dense floating-point tensors")
    return found, [note for note in notes if note]


def _shown(name: str) -> str:
    """A name in a file, for a line on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in name[:200])


def _unfit(value: Tensor) -> str | None:
    """What keeps a tensor from being a weight; None where nothing does."""
    if value.is_meta:
        return "has no values, only a shape"
    if value.is_nested or value.layout != torch.strided:
        return "is " + ("nested" if value.is_nested else str(value.layout).removeprefix("torch."))
    if not value.is_floating_point():
        return f"is {str(value.dtype).removeprefix('torch.')}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"of {list(value.shape)} repeats {value.untyped_storage().nbytes()} bytes"
    return None


def _recognise(tensors: dict[str, Tensor], file: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter of the tensors' layout, and the tensors under exactly the names that it has for them."""
    named = _renamed(tensors, lambda name: PREFIXES.sub("", name), file)
    for adapter in ADAPTERS:
        if adapter.recognises(named):
            return adapter, _renamed(named, adapter.usual, file)
    raise UserError(f"{file} holds no ConvNeXt V2 in any layout known: one of its names is {_shown(min(tensors))}")


def _renamed(tensors: dict[str, Tensor], rename: Callable[[str], str], file: Path) -> dict[str, Tensor]:
    """The tensors under other names. Raises UserError where two of them would have the same."""
    named: dict[str, str] = {}
    for name in sorted(tensors):
        if (other := named.setdefault(rename(name), name)) != name:
            raise UserError(
                f"{file} holds {_shown(other)} and {_shown(name)}, which are two of one tensor: remove one of them"
            )
    return {rename(name): value for name, value in tensors.items()}


def _infer_architecture(named: dict[str, Tensor], adapter: Adapter, file: Path) -> dict[str, Any]:
    """Name, input channels and stem stride, from the shape of the stem, and from how many blocks there are."""
    name = adapter.rename("downsample_layers.0.0.weight")
    stem = named.get(name)
    if stem is None or stem.dim() != 4:
        raise UserError(f"{file}: {name} is missing or no convolution")
    _, in_chans, stride = stem.shape[:3]
    depths, dims = [], []
    for stage in range(4):
        norms = [f"stages.{stage}.{block}.norm.weight" for block in range(len(named))]
        found = [block for block, norm in enumerate(norms) if adapter.rename(norm) in named]
        if not found:
            raise UserError(f"{file} is no ConvNeXt V2: it has no {adapter.rename(norms[0])}")
        depths.append(found[-1] + 1)
        dims.append(named[adapter.rename(norms[found[0]])].numel())
    return {"name": name_of(tuple(depths), tuple(dims)), "in_chans": in_chans, "stem_stride": stride}


def _official(named: dict[str, Tensor], adapter: Adapter, shape: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The state under the official names. Every tensor is finite and of the shape that the model's size asks for."""
    expected = _expected(named, adapter, shape, file)
    width = len(expected["downsample_layers.0.0.weight"])
    names = {adapter.rename(key): key for key in expected}
    missing, unknown = sorted(names.keys() - named.keys()), sorted(named.keys() - names.keys())
    if missing or unknown:
        what = [f"{name} is missing" for name in missing[:1]]
        what += [f"{_shown(name)} is unknown" for name in unknown[:1]]
        raise UserError(f"{file} is no ConvNeXt V2 {shape['name']}: {', '.join(what)}")
    state = {}
    for name, key in names.items():
        value, target = named[name], expected[key]
        packed = adapter.pack(key, target, width)
        if [n for n in value.shape if n != 1] != [n for n in packed.shape if n != 1]:
            raise UserError(f"{file}: {name} is {list(value.shape)}, not {list(packed.shape)}")
        state[key] = adapter.unpack(key, value, target.shape).float().contiguous()
        if not state[key].isfinite().all():
            raise UserError(f"{file}: {name} has values that are not finite")
    return state


def _expected(named: dict[str, Tensor], adapter: Adapter, shape: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """Tensors without values under the official names that a model of this shape has, and the decoder that there is."""
    name = adapter.rename("head.weight")
    head = named.get(name)
    if head is not None and (head.dim() < 2 or not len(head)):
        raise UserError(f"{file}: {name} is {list(head.shape)}, no head of any classes")
    with torch.device("meta"):
        model = SparseEncoder(**shape) if head is None else Classifier(**shape, num_classes=len(head))
        expected = model.state_dict()
        if head is None and adapter.rename("norm.weight") in named:
            norm = nn.LayerNorm(model.num_features)
            expected |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
    return expected | {name: value for name, value in named.items() if DECODER.match(name)}


def _ends_in_identity(state: dict[str, Tensor]) -> bool:
    """Whether there is a final norm that changes nothing."""
    return "norm.weight" in state and bool((state["norm.weight"] == 1).all() and (state["norm.bias"] == 0).all())


def read_settings(file: Path) -> tuple[Settings, dict[str, Any]]:
    """What the config says that lies beside a file of weights or, for a checkpoint, in the folder of its run.

    With it the config itself under the name of the layout whose it is, if it is of any. Raises UserError for a config
    that can't be understood, or is of a model that computes something else.
    """
    path = file.parent / CONFIG
    if not path.is_file() and file.parent.parent.name == "checkpoints":
        path = file.parent.parent.parent / CONFIG
    config = read_json(path) if path.is_file() else None
    if not isinstance(config, dict):
        return Settings(), {}
    try:
        for adapter in ADAPTERS:
            if settings := adapter.read_config(config, path.parent):
                unlike = adapter.unlike(config)
                break
        else:
            return Settings(), {}
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path} can't be understood ({reason[:200]}): put it right, or move it away") from None
    if unlike:
        raise UserError(f"{path} describes a model that this package does not have: {unlike}")
    return settings, {adapter.name: config}
