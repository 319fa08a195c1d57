"""Any checkpoint of ConvNeXt V2 -> its tensors under the official names, with nothing unpickled but tensors."""

import argparse
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_fcmae.classifier import Classifier
from sparse_fcmae.config import image_size_of
from sparse_fcmae.data import channel_stats
from sparse_fcmae.encoder import SIZES, SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import one_line, read_json
from sparse_fcmae.formats.layouts import DECODER, LAYOUTS, Layout, recognise
from sparse_fcmae.training.checkpoint import RunFolder

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
FILES = ("model.safetensors", "model.pt", "model.pth", "pytorch_model.bin")  # that a folder may hold, by preference
WRAPPERS = ("model", "state_dict", "module", "model_state_dict")  # keys under which trainers keep the weights
WIDTHS = {dims[0]: name for name, (_, dims) in SIZES.items()}


@dataclass(frozen=True)
class Weights:
    """ConvNeXt V2's weights, float32, under the official names.

    state: the encoder's tensors and, where known, those of `norm`, `head` and decoder. architecture: `SparseEncoder`'s
    arguments. classes: the names of the head's outputs. stats: mean and standard deviation of the channels that images
    are normalised with, where they are known. layout: what they were read as. sparse: whether that is a pretraining
    checkpoint's. original: the tensors as they were read, with the names that the layout has. notes: what was left out,
    and why.
    """

    state: dict[str, Tensor]
    architecture: dict[str, Any]
    classes: tuple[str, ...] | None = None
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    layout: str = "official"
    sparse: bool = False
    original: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, classes: tuple[str, ...] | None = None) -> "Weights":
        """Those of an encoder or a classifier."""
        state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
        return cls(state, architecture(model), classes)

    @property
    def num_classes(self) -> int:
        """Outputs of the head, 0 where there is none."""
        return len(self.state["head.weight"]) if "head.weight" in self.state else 0

    @property
    def has_decoder(self) -> bool:
        return "mask_token" in self.state

    def per_image(self) -> "Weights":
        """With the response norm over each image, as everywhere but in pretraining."""
        return replace(self, architecture=self.architecture | {"grn_scope": "image"})

    def check_usable(self, source: str | Path) -> None:
        """Raises UserError where image files, as this package reads and normalises them, are not what they take."""
        channels = self.architecture["in_chans"]
        if channels not in (1, 3):
            raise UserError(f"{source} takes {channels} channels: image files give 3 (colour) or 1 (greyscale)")
        ours, own = channel_stats(channels), self.stats or channel_stats(channels)
        pairs = zip(sum(own, ()), sum(ours, ()), strict=False)
        if len(own[0]) != channels or any(abs(a - b) > 1e-3 for a, b in pairs):
            raise UserError(
                f"{source} takes images normalised with mean {own[0]} and deviation {own[1]}: this "
                f"package normalises with {ours[0]} and {ours[1]} alone"
            )

    def without(self, *parts: str) -> dict[str, Tensor]:
        """The state but for `parts`, of "norm", "head" and "decoder"."""
        return {key: value for key, value in self.state.items() if _part(key) not in parts}

    def encoder(self, backend: str = "auto") -> SparseEncoder:
        """The encoder, in evaluation mode."""
        encoder = SparseEncoder(**self.architecture, backend=backend)
        encoder.load_state_dict(self.without("norm", "head", "decoder"))
        return encoder.eval()

    def classifier(self, backend: str = "auto", drop_path: float = 0.0) -> Classifier:
        """The classifier, in evaluation mode. Raises UserError where there is no head."""
        if not self.num_classes:
            raise UserError("these weights have no classification head")
        model = Classifier(**self.architecture, num_classes=self.num_classes, backend=backend, drop_path=drop_path)
        model.load_state_dict(self.without("decoder"))
        return model.eval()


def architecture(encoder: SparseEncoder) -> dict[str, Any]:
    """The arguments that make an encoder of the same shape."""
    names = ("name", "image_size", "in_chans", "stem_stride", "grn_scope")
    return {name: getattr(encoder, name) for name in names}


def read_weights(path: str | Path, *, whole: bool = False) -> Weights:
    """The weights in a checkpoint: run, checkpoint or exported folder of ours, folder of timm or Hugging Face,
    .safetensors, .pt, .pth or .bin file. whole: of a run's folder the newest checkpoint, which has the decoder, rather
    than what was exported.

    The layout is recognised by the names, the size by the shapes. Raises UserError, in one line, for what is missing,
    unknown, of a wrong shape, truncated, or holds code.
    """
    file = weights_file(Path(path), whole)
    return understand(_load(file), file)


def understand(found: Any, file: Path) -> Weights:
    """The weights in what a file was found to hold: `read_weights` without the reading."""
    tensors, notes = _unwrap(found, file)
    name, named = recognise(tensors)
    if name is None:
        raise UserError(f"{file} holds no ConvNeXt V2 in any layout known: one of its names is {min(tensors)}")
    layout = LAYOUTS[name]
    shape = infer_architecture(named, layout, file)
    state = _official(named, layout, shape, file)
    for key, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{file}: {layout.rename(key)} has values that are not finite")
    if "norm.weight" in state and "head.weight" not in state and _is_identity(state):
        state = {key: value for key, value in state.items() if _part(key) != "norm"}
        notes.append("left out the final norm: it is the identity, as pretraining does not train it")
    sparse = name == "fcmae" or "mask_token" in state or any(".encoder.downsample" in f".{key}" for key in tensors)
    options = read_options(file)
    classes, stats = options.pop("classes"), options.pop("stats")
    if classes and len(classes) != len(state.get("head.weight", ())):
        classes = None
    if any(side % (8 * shape["stem_stride"]) for side in options["image_size"]):
        height, width = options["image_size"]
        notes.append(f"left out the image size {height}x{width}, which is no multiple of the patch: 224 instead")
        options["image_size"] = (224, 224)
    return Weights(state, shape | options, classes, stats, name, sparse, named, tuple(notes))


def load_encoder(path: str | Path, *, backend: str = "auto") -> SparseEncoder:
    """An encoder with the weights of any checkpoint that `read_weights` reads. In evaluation mode."""
    return read_weights(path).encoder(backend)


def load_classifier(path: str | Path, *, backend: str = "auto") -> Classifier:
    """A classifier with the weights of any checkpoint that `read_weights` reads. In evaluation mode.

    Raises UserError where it has no head.
    """
    return read_weights(path).classifier(backend)


def weights_file(path: Path, whole: bool = False) -> Path:
    """The file with the weights, of what a user names; `whole` as in `read_weights`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    checkpoint = RunFolder(path).latest() if whole else None
    for folder in () if checkpoint else (path, path / "exported"):
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    if (path / f"{FILES[0]}.index.json").is_file():
        raise UserError(f"{path} holds weights in several files: save them in one, with a larger max_shard_size")
    checkpoint = checkpoint or RunFolder(path).latest()
    if checkpoint is None:
        raise UserError(f"{path} holds no {FILES[0]}, {', '.join(FILES[1:])}, exported encoder or checkpoint")
    return checkpoint / FILES[0]


def infer_architecture(state: dict[str, Tensor], layout: Layout, file: Path) -> dict[str, Any]:
    """Name, input channels and stem stride, from the shape of the stem in a layout."""
    key = layout.rename("downsample_layers.0.0.weight")
    stem = state.get(key)
    if stem is None or stem.dim() != 4:
        raise UserError(f"{file}: {key} is missing or no convolution")
    width, in_chans, stride = stem.shape[:3]
    if width not in WIDTHS:
        raise UserError(f"{file}: a stem of {width} channels is no ConvNeXt V2's ({', '.join(map(str, WIDTHS))})")
    return {"name": WIDTHS[width], "in_chans": in_chans, "stem_stride": stride}


def read_options(file: Path) -> dict[str, Any]:
    """What shapes do not tell: image_size, grn_scope, classes and stats (None where unknown), from the config of ours,
    timm or Hugging Face beside a file, or from that of its checkpoint's run.

    Raises UserError for a config that can't be understood.
    """
    options: dict[str, Any] = {"image_size": (224, 224), "grn_scope": "image", "classes": None, "stats": None}
    config = file.parent / CONFIG
    if not config.is_file() and file.parent.parent.name == "checkpoints":
        config = file.parent.parent.parent / CONFIG
    found = read_json(config) if config.is_file() else None
    if not isinstance(found, dict):
        return options
    processor = file.parent / PROCESSOR
    try:
        if "pretrained_cfg" in found:  # timm
            own = found["pretrained_cfg"]
            size, mean, std = own.get("input_size", ())[1:], own.get("mean"), own.get("std")
            names = found.get("label_names") or own.get("label_names")
        elif found.get("model_type") == "convnextv2":  # Hugging Face
            names = [name for _, name in sorted(found.get("id2label", {}).items(), key=lambda item: int(item[0]))]
            names = None if names[:1] == ["LABEL_0"] else names
            size, own = found.get("image_size"), read_json(processor) if processor.is_file() else {}
            mean, std = own.get("image_mean"), own.get("image_std")
        elif str(found.get("format")).startswith("sparse-fcmae"):
            size, names, mean, std = (found.get(name) for name in ("image_size", "classes", "mean", "std"))
            options["grn_scope"] = found.get("grn_scope", "image")
        else:
            return options
        if size:
            options["image_size"] = image_size_of(size)
        if names:
            options["classes"] = tuple(map(str, names))
        if mean and std:
            options["stats"] = tuple(map(float, mean)), tuple(map(float, std))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{config} can't be understood ({reason}): put it right, or move it away") from None
    return options


def _load(file: Path) -> Any:
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


def _unwrap(found: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, out of what trainers wrap them in, and a note on what lay beside them."""
    notes = []
    while isinstance(found, dict) and (inner := next((k for k in WRAPPERS if isinstance(found.get(k), dict)), None)):
        beside = sorted(str(key) for key in found if key != inner)
        notes += [f"left out what lies beside {inner!r} in the file: {', '.join(beside)}"] if beside else []
        found = found[inner]
    named = isinstance(found, dict) and found and all(isinstance(key, str) for key in found)
    if not named or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file} holds no state_dict: it needs tensors by name, bare or under {', '.join(WRAPPERS)}")
    return found, notes


def _official(named: dict[str, Tensor], layout: Layout, shape: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """The state under the official names, every tensor of the size's shape."""
    head = named.get(layout.rename("head.weight"))
    if head is not None and (head.dim() < 2 or not len(head)):
        raise UserError(f"{file}: {layout.rename('head.weight')} is {list(head.shape)}, no head of any classes")
    with torch.device("meta"):
        model = SparseEncoder(**shape) if head is None else Classifier(**shape, num_classes=len(head))
        expected = model.state_dict()
        if head is None and layout.rename("norm.weight") in named:
            expected |= {f"norm.{key}": value for key, value in nn.LayerNorm(model.num_features).state_dict().items()}
    expected |= {key: value for key, value in named.items() if DECODER.match(key)}
    width = len(expected["downsample_layers.0.0.weight"])
    names = {layout.rename(key): key for key in expected}
    missing, unknown = sorted(names.keys() - named.keys()), sorted(named.keys() - names.keys())
    if missing or unknown:
        what = [f"{name} is missing" for name in missing[:1]] + [f"{name} is unknown" for name in unknown[:1]]
        raise UserError(f"{file} is no ConvNeXt V2 {shape['name']}: {', '.join(what)}")
    state = {}
    for name, key in names.items():
        value, target = named[name], expected[key]
        packed = layout.pack(key, target, width)
        if [n for n in value.shape if n != 1] != [n for n in packed.shape if n != 1]:
            raise UserError(f"{file}: {name} is {list(value.shape)}, not {list(packed.shape)}")
        state[key] = layout.unpack(key, value, target.shape).float().contiguous()
    return state


def _part(key: str) -> str:
    """The part of the model that an official name belongs to."""
    if DECODER.match(key):
        return "decoder"
    return key.split(".")[0] if key.startswith(("norm.", "head.")) else "encoder"


def _is_identity(state: dict[str, Tensor]) -> bool:
    return bool((state["norm.weight"] == 1).all() and (state["norm.bias"] == 0).all())
