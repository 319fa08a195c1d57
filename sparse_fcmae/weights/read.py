"""Reads the weights of any checkpoint of ConvNeXt V2.

The tensors in a file are recognised by their names, renamed to the official names, and checked against the model of
their size.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_fcmae.data.transform import Transform
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.convnext import STEM_STRIDES, SparseEncoder, name_of
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.runtime.checkpoint_folder import STEP, damaged_checkpoints
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, read_json
from sparse_fcmae.runtime.notices import say_once
from sparse_fcmae.weights.adapter import CONFIG, Adapter, Settings
from sparse_fcmae.weights.adapters import ADAPTERS
from sparse_fcmae.weights.opening import listed, load, shown, weights_file
from sparse_fcmae.weights.weights import DECODER, Weights, patch_size_of

PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")  # of DistributedDataParallel, torch.compile and trainers
INSIDE_A_MODEL = re.compile(r"(^|\.)encoder\.downsample")  # the names of an encoder in a model for pretraining


def load_encoder(path: str | Path, *, backend: str = "auto") -> SparseEncoder:
    """An encoder with the weights of any checkpoint that `read_weights` reads, in evaluation mode.

    What was left out of a checkpoint is said once.
    """
    return _read_and_say(path).encoder(backend)


def load_classifier(path: str | Path, *, backend: str = "auto") -> Classifier:
    """A classifier with the weights of any checkpoint that `read_weights` reads, in evaluation mode.

    Raises UserError where it has no head. What was left out of a checkpoint is said once.
    """
    return _read_and_say(path).classifier(backend)


def load_fcmae(path: str | Path, *, backend: str = "auto") -> FCMAE:
    """The model of a pretraining run, with its decoder, in evaluation mode, as `forward` and `errors` need it.

    path: a run of `pretrain`, one of its checkpoints, or a checkpoint of the official pretraining code. Raises
    UserError where it has no decoder.
    """
    return _read_and_say(path, whole=True).fcmae(backend)


def _read_and_say(path: str | Path, whole: bool = False) -> Weights:
    weights = read_weights(path, whole=whole)
    for note in weights.notes:
        say_once(f"{path}: {note}")
    return weights


def load_transform(path: str | Path, crop_fraction: float | None = None) -> Transform:
    """What makes of an image's file the image that the model of a checkpoint takes: float32 [C, H, W], normalised.

    path: as in `read_weights`. crop_fraction: as in `CentreView`; None for what suits the size or, where the model was
    trained on native windows, for the window in the middle.
    """
    return read_weights(path).transform(crop_fraction)


def read_weights(path: str | Path, *, whole: bool = False) -> Weights:
    """The weights in a checkpoint.

    path: a folder that `pretrain` or `finetune` made, one of its checkpoints or exports, a folder of timm or Hugging
    Face, a .safetensors, .pt, .pth or .bin file, or a name of public weights, as `opening.weights_file` takes it.
    whole: take a checkpoint of a run, which has the decoder, and not what was exported: the best where it looks for
    one, else the newest.

    The layout is recognised by the names, the size by the shapes. The encoder may be a part of another model. Raises
    UserError, in one line, for what is missing, unknown, of a wrong shape, truncated, or holds code.
    """
    file = weights_file(Path(path), whole)
    tensors, notes = load(file)
    found = understand(tensors, file)
    found = replace(found, notes=(*notes, *found.notes))
    if STEP.fullmatch(file.parent.name) and file.parent != Path(path):
        found = replace(found, notes=(*found.notes, *damaged_checkpoints(Path(path))))
    return found


def understand(tensors: dict[str, Tensor], file: Path) -> Weights:
    """The weights in tensors that a file was found to hold: `read_weights` without the reading."""
    adapter, named, notes = _recognise(tensors, file)
    shape = _infer_architecture(named, adapter, file)
    state = _official(named, adapter, shape, file)
    if "head.weight" not in state and _ends_in_identity(state):
        del state["norm.weight"], state["norm.bias"]
        notes.append("left out the final norm: it is the identity, as pretraining does not train it")
    settings, config, more = _read_config(adapter, file)
    notes += more
    image_size, classes, form = settings.image_size, settings.classes, settings.form
    if form and form.in_chans != shape["in_chans"]:
        notes.append(f"left out the statistics: {form.in_chans} channels have one, the stem takes {shape['in_chans']}")
        form = None
    if any(side % patch_size_of(shape) for side in image_size):
        height, width = image_size
        notes.append(f"left out the image size {height}x{width}, which is no multiple of the patch: 224 instead")
        image_size = (224, 224)
    if classes and "head.weight" not in state:
        classes = None
    weights = Weights(
        state=state,
        architecture=shape | {"image_size": image_size, "grn_scope": settings.grn_scope},
        classes=classes,
        known_form=form,
        layout=adapter.name,
        sparse=adapter.sparse or "mask_token" in state or any(map(INSIDE_A_MODEL.search, tensors)),
        original=named,
        config=config,
        notes=tuple(notes),
        origin=settings.origin,
        task=settings.task if "head.weight" in state else "classification",
    )
    if weights.classes and len(weights.classes) != weights.num_classes:
        raise UserError(
            f"{file}: its {CONFIG} names {len(weights.classes)} classes, its head has {weights.num_classes} outputs: "
            "put the config right, or move it away"
        )
    if unlike := config and _unlike_shapes(adapter, config, weights):
        raise UserError(f"{file}: {unlike}: put the config right, or move it away")
    return weights


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


def _recognise(tensors: dict[str, Tensor], file: Path) -> tuple[Adapter, dict[str, Tensor], list[str]]:
    """The adapter of the tensors' layout, the tensors under exactly the names that it has for them, and notes.

    Where the encoder is a part of a model, the rest of that is left out.
    """
    named = _renamed(tensors, lambda name: PREFIXES.sub("", name), file)
    found = _encoders_in(named)
    if len(found) > 1:
        places = " and ".join(shown(prefix) or "the top" for prefix in found)
        raise UserError(f"{file} holds {len(found)} encoders, at {places}: save the tensors of one of them alone")
    if not found:
        raise UserError(f"{file} holds no ConvNeXt V2 in any layout known: one of its names is {shown(min(tensors))}")
    ((prefix, adapter),) = found.items()
    beside = [name for name in named if not name.startswith(prefix)]
    inside = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    extra = [name for name in inside if adapter.is_extra(name, inside.keys())]
    notes = [f"took the encoder at {shown(prefix)}"] if prefix else []
    notes += [f"left out what is no part of the encoder: {listed(beside)}"] if beside else []
    notes += [f"left out norms of single stages, which {adapter.name} adds: {listed(extra)}"] if extra else []
    kept = {name: value for name, value in inside.items() if name not in extra}
    for name, value in kept.items():
        if what := _unfit(value):
            raise UserError(f"{file}: {shown(prefix + name)} {what}: weights are dense floating-point tensors")
    return adapter, _renamed(kept, adapter.usual, file), notes


def _encoders_in(tensors: dict[str, Tensor]) -> dict[str, Adapter]:
    """What stands before the names of each encoder among the tensors, and the adapter of its layout."""
    found: dict[str, Adapter] = {}
    for name in tensors:
        dots = [0, *(match.end() for match in re.finditer(r"\.", name))]
        for prefix in (name[:dot] for dot in dots):
            if not (candidates := [adapter for adapter in ADAPTERS if adapter.is_stem(name.removeprefix(prefix))]):
                continue
            inside = {n.removeprefix(prefix) for n in tensors if n.startswith(prefix)}
            if adapter := next((adapter for adapter in candidates if adapter.recognises(inside)), None):
                found[prefix] = adapter
                break
    return found


def _renamed(tensors: dict[str, Tensor], rename: Callable[[str], str], file: Path) -> dict[str, Tensor]:
    """The tensors under other names. Raises UserError where two of them would have the same."""
    named: dict[str, str] = {}
    for name in sorted(tensors):
        if (other := named.setdefault(rename(name), name)) != name:
            raise UserError(
                f"{file} holds {shown(other)} and {shown(name)}, which are two of one tensor: remove one of them"
            )
    return {rename(name): value for name, value in tensors.items()}


def _infer_architecture(named: dict[str, Tensor], adapter: Adapter, file: Path) -> dict[str, Any]:
    """The arguments of `SparseEncoder` that shapes and names tell: stem, blocks, and which parts these have."""
    name = adapter.rename("downsample_layers.0.0.weight")
    stem = named.get(name)
    if stem is None or stem.dim() != 4:
        raise UserError(f"{file}: {name} is missing or no convolution")
    _, in_chans, stride = stem.shape[:3]
    if stride not in STEM_STRIDES:
        strides = ", ".join(map(str, STEM_STRIDES))
        raise UserError(
            f"{file}: {name} is {list(stem.shape)}, a stem of stride {stride}: it has to be one of {strides}"
        )
    depths, dims = [], []
    for stage in range(4):
        norms = [f"stages.{stage}.{block}.norm.weight" for block in range(len(named))]
        found = [block for block, norm in enumerate(norms) if adapter.rename(norm) in named]
        if not found:
            raise UserError(f"{file} is no ConvNeXt V2: it has no {adapter.rename(norms[0])}")
        depths.append(found[-1] + 1)
        dims.append(named[adapter.rename(norms[found[0]])].numel())
    shape = {"name": name_of(tuple(depths), tuple(dims)), "in_chans": in_chans, "stem_stride": stride}
    if not adapter.keeps_blocks:
        return shape | {"grn": True, "layer_scale": False}
    block = adapter.rename("stages.0.0.")
    has_grn = any(name.startswith(block + "grn.") for name in named)
    return shape | {"grn": has_grn, "layer_scale": block + "gamma" in named}


def _official(named: dict[str, Tensor], adapter: Adapter, shape: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The state under the official names. Every tensor is finite and of the shape that the model's size asks for."""
    expected = _expected(named, adapter, shape, file)
    width = len(expected["downsample_layers.0.0.weight"])
    names = {adapter.rename(key): key for key in expected}
    missing, unknown = sorted(names.keys() - named.keys()), sorted(named.keys() - names.keys())
    if missing or unknown:
        what = [f"{name} is missing" for name in missing[:1]]
        what += [f"{shown(name)} is unknown" for name in unknown[:1]]
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
        if "mask_token" in named:
            expected |= _decoder(named, shape)
    return expected


def _decoder(named: dict[str, Tensor], shape: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors without values of a decoder as deep and as wide as the one that there is."""
    depth = len({match[1] for match in map(re.compile(r"decoder\.(\d+)\.").match, named) if match})
    size = {"decoder_dim": max(1, named["mask_token"].numel()), "decoder_depth": max(1, depth)}
    return {name: value for name, value in FCMAE(**shape, **size).state_dict().items() if DECODER.match(name)}


def _ends_in_identity(state: dict[str, Tensor]) -> bool:
    """Whether there is a final norm that changes nothing."""
    return "norm.weight" in state and bool((state["norm.weight"] == 1).all() and (state["norm.bias"] == 0).all())


def _read_config(adapter: Adapter, file: Path) -> tuple[Settings, dict[str, Any] | None, list[str]]:
    """What the config says that lies beside a file of weights or, for a checkpoint, in the folder of its run.

    With it the config itself where it is of the weights' layout, and notes. Raises UserError for a config that can't be
    understood, or is of a model that computes something else.
    """
    path = file.parent / CONFIG
    if not path.is_file() and file.parent.parent.name == "checkpoints":
        path = file.parent.parent.parent / CONFIG
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        return Settings(), None, [f"left {path} aside, which is no config of a model"]
    try:
        owner, settings = next(
            ((owner, found) for owner in ADAPTERS if (found := owner.read_config(config, path.parent))), (None, None)
        )
        unlike = (owner or adapter).unlike(config)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{path} can't be understood ({reason[:200]}): put it right, or move it away") from None
    if unlike:
        raise UserError(f"{path} describes a model that this package does not have: {unlike}")
    if settings is None:
        return Settings(), None, [f"left {path} aside, which is no config of ConvNeXt V2"] if config else []
    return settings, config if owner is adapter else None, []


def _unlike_shapes(adapter: Adapter, config: dict[str, Any], weights: Weights) -> str | None:
    """The first number in a config of the weights' layout that their shapes contradict; None where there is none."""
    unnamed = replace(weights, classes=None)
    said, found = adapter.shapes_in(config), adapter.shapes_in(adapter.configs[CONFIG](unnamed))
    for name, value in said.items():
        known = [tuple(v) if isinstance(v, list) else v for v in (value, found.get(name))]
        if None not in known and known[0] != known[1]:
            return f"its {CONFIG} says {name} {value}, its tensors have {found[name]}"
    return None
