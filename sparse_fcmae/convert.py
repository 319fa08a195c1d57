"""Our checkpoints -> dense weights in the layouts of the official code, timm and Hugging Face.

Parameters are stored densely under the official names, so that converting is renaming and reshaping; the result is run
against the source all the same before it is put in place.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_fcmae.config import ConvertConfig, image_size_of
from sparse_fcmae.data import channel_stats
from sparse_fcmae.encoder import SIZES, SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import new_folder, one_line, read_json, save_tensors, write_json, writing
from sparse_fcmae.training.checkpoint import RunFolder

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
TOLERANCE = 1e-5  # relative Frobenius error in float32
CONV_MLP = ("atto", "femto", "pico", "nano")  # timm keeps these sizes' pointwise layers as 1x1 convolutions

TIMM_NAMES = [
    (r"^downsample_layers\.0\.(\d)", r"stem.\1"),
    (r"^downsample_layers\.(\d)\.(\d)", r"stages.\1.downsample.\2"),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"^norm\.", "head.norm."),
]
HUGGINGFACE_NAMES = [
    (r"^downsample_layers\.0\.0", "embeddings.patch_embeddings"),
    (r"^downsample_layers\.0\.1", "embeddings.layernorm"),
    (r"^downsample_layers\.(\d)\.(\d)", r"encoder.stages.\1.downsampling_layer.\2"),
    (r"^stages\.(\d)\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (r"^stages\.(\d)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"\.grn\.gamma$", ".grn.weight"),
    (r"\.grn\.beta$", ".grn.bias"),
    (r"^norm\.", "layernorm."),
    (r"^", "convnextv2."),
]


@dataclass(frozen=True)
class Layout:
    """A library's names, shapes and configuration of the dense encoder.

    configs: file name -> content for an encoder. shape: of an official parameter in this layout. norm: whether the
    library's encoder ends in a norm that pretraining does not train and that is written as the identity. library: its
    module, and the name in it that `load` takes, with a folder, to make the library's function from images to features.
    """

    names: list[tuple[str, str]]
    configs: Callable[[SparseEncoder], dict[str, Any]]
    shape: Callable[[str, str, Tensor], tuple[int, ...]]
    norm: bool
    library: tuple[str, str] | None = None
    load: Callable[[Any, Path], Callable[[Tensor], Tensor]] | None = None

    def rename(self, key: str) -> str:
        """An official name in this layout."""
        for pattern, replacement in self.names:
            key = re.sub(pattern, replacement, key)
        return key

    def write(self, encoder: SparseEncoder) -> dict[str, Tensor]:
        """The encoder's parameters in this layout."""
        state = dict(encoder.state_dict())
        if self.norm:
            state["norm.weight"] = torch.ones(encoder.num_features)
            state["norm.bias"] = torch.zeros(encoder.num_features)
        return {
            self.rename(key): value.detach().cpu().reshape(self.shape(encoder.name, key, value)).contiguous()
            for key, value in state.items()
        }

    def read(self, state: dict[str, Tensor], like: SparseEncoder) -> SparseEncoder:
        """The encoder of a state in this layout, of the same architecture as `like`."""
        encoder = SparseEncoder(**architecture(like), backend="masked")
        official = encoder.state_dict()
        encoder.load_state_dict({key: state[self.rename(key)].reshape(value.shape) for key, value in official.items()})
        return encoder


def architecture(encoder: SparseEncoder) -> dict[str, Any]:
    """The arguments that make an encoder of the same shape."""
    return {
        "name": encoder.name,
        "image_size": encoder.image_size,
        "in_chans": encoder.in_chans,
        "stem_stride": encoder.stem_stride,
        "grn_scope": encoder.grn_scope,
    }


def _official_config(encoder: SparseEncoder) -> dict[str, Any]:
    mean, std = channel_stats(encoder.in_chans)
    return {CONFIG: {"format": "sparse-fcmae encoder", **architecture(encoder), "mean": mean, "std": std}}


def _timm_config(encoder: SparseEncoder) -> dict[str, Any]:
    if encoder.stem_stride == 2:  # timm would put a further downsampling before the first stage
        raise UserError("timm's ConvNeXt V2 has no stem of stride 2: convert to huggingface or official")
    mean, std = channel_stats(encoder.in_chans)
    pretrained = {
        "input_size": [encoder.in_chans, *encoder.image_size],
        "pool_size": list(encoder.grid(*encoder.image_size)),
        "num_classes": 0,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "other",
    }
    arguments = {"in_chans": encoder.in_chans, "patch_size": encoder.stem_stride}
    config = {
        "architecture": f"convnextv2_{encoder.name}",
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    return {CONFIG: config}


def _huggingface_config(encoder: SparseEncoder) -> dict[str, Any]:
    depths, dims = SIZES[encoder.name]
    mean, std = channel_stats(encoder.in_chans)
    config = {
        "model_type": "convnextv2",
        "architectures": ["ConvNextV2Model"],
        "num_channels": encoder.in_chans,
        "patch_size": encoder.stem_stride,
        "num_stages": len(depths),
        "hidden_sizes": dims,
        "depths": depths,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "image_size": min(encoder.image_size),
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(encoder.image_size)},
        "crop_pct": 0.875,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    return {CONFIG: config, PROCESSOR: processor}


def _same_shape(name: str, key: str, value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)


def _timm_shape(name: str, key: str, value: Tensor) -> tuple[int, ...]:
    if ".grn." in key:
        return (value.numel(),)
    if name in CONV_MLP and re.search(r"pwconv\d\.weight$", key):
        return (*value.shape, 1, 1)
    return tuple(value.shape)


def _load_timm(create_model: Any, folder: Path) -> Callable[[Tensor], Tensor]:
    return create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features


def _load_huggingface(model_class: Any, folder: Path) -> Callable[[Tensor], Tensor]:
    model = model_class.from_pretrained(folder).eval()
    return lambda images: model(images).last_hidden_state


LAYOUTS = {
    "official": Layout([], _official_config, _same_shape, norm=False),
    "timm": Layout(TIMM_NAMES, _timm_config, _timm_shape, norm=True, library=("timm", "create_model"), load=_load_timm),
    "huggingface": Layout(
        *(HUGGINGFACE_NAMES, _huggingface_config, _same_shape),
        norm=True,
        library=("transformers", "ConvNextV2Model"),
        load=_load_huggingface,
    ),
}


def convert(source: str | Path, destination: str | Path, *, to: str, overwrite: bool = False) -> str:
    """Writes a checkpoint's encoder to the folder `destination` in layout `to`; returns what was done, a line each.

    source: run folder, checkpoint folder, exported folder or .safetensors file of ours. The folder appears only after
    it was read back and its features found equal to the source's (fp32, 1e-5): by the real library where that can be
    imported, else by this package's reader. Raises UserError where anything is amiss, with `destination` untouched.
    """
    config = ConvertConfig(source=str(source), destination=str(destination), to=to, overwrite=overwrite)
    if config.to not in LAYOUTS:
        raise UserError(f"unknown layout {config.to!r}: choose --to {', '.join(LAYOUTS)}")
    target = Path(config.destination)
    _check_destination(target, config.overwrite)
    encoder, dropped = read_encoder(config.source)
    verified = write_encoder(encoder, target, config.to)
    report = [f"wrote {target} ({config.to}): {encoder.name}, {len(encoder.state_dict())} tensors"]
    if dropped:
        report.append(f"dropped {dropped} tensors of the decoder: pretraining alone uses them")
    return "\n".join([*report, verified])


def write_encoder(encoder: SparseEncoder, folder: Path, to: str) -> str:
    """Writes and verifies an encoder's folder in a layout; returns the line that says how it was verified."""
    layout = LAYOUTS[to]
    with new_folder(folder) as temporary:
        with writing(folder):
            save_tensors(layout.write(encoder), temporary / WEIGHTS)
            for name, content in layout.configs(encoder).items():
                write_json(temporary / name, content)
        return verify(encoder, temporary, layout)


def export_encoder(encoder: SparseEncoder, folder: Path) -> None:
    """Writes the dense encoder under the official names, with the config that `load_encoder` reads."""
    write_encoder(encoder, folder, "official")


@torch.no_grad()
def verify(encoder: SparseEncoder, folder: Path, layout: Layout) -> str:
    """Compares the features of a folder in a layout with the encoder's; returns the line that says how.

    Raises UserError where they differ by more than TOLERANCE.
    """
    p = encoder.patch_size
    images = torch.randn(1, encoder.in_chans, 2 * p, 3 * p, generator=torch.Generator().manual_seed(0))
    weight = next(encoder.parameters())
    with torch.autocast(weight.device.type, enabled=False):
        expected = encoder(images.to(weight.device)).cpu()
    reader, how = layout.read(load_file(folder / WEIGHTS), encoder), "read back by sparse-fcmae"
    if layout.load and layout.library:
        module, name = layout.library
        try:
            entry = getattr(importlib.import_module(module), name)
        except Exception as error:  # not installed, or, like torchvision beside another torch, unusable
            how += f", as {module} can't be imported ({one_line(error)})"
        else:
            reader, how = layout.load(entry, folder), f"loaded by {module}"
    error = ((reader(images) - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise UserError(f"not written: the result's features differ from the source's by {error:.1e} ({how})")
    return f"verified: {how}, features equal within {max(error, 1e-9):.0e}"


def read_encoder(path: str | Path) -> tuple[SparseEncoder, int]:
    """The encoder of any checkpoint of ours, and how many tensors that are not the encoder's were left out."""
    file = _weights_file(Path(path))
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} can't be read as safetensors: {one_line(error)}") from None
    own = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")} or state
    encoder = SparseEncoder(**infer_architecture(own, file), **_options(file))
    missing, unexpected = (sorted(a - b) for a, b in (_both_ways(encoder, own)))
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is unknown"
        raise UserError(f"{file} is not an encoder of ours: {what}")
    _load_exactly(encoder, own, file)
    return encoder, len(state) - len(own)


def load_encoder(path: str | Path, *, backend: str = "auto") -> SparseEncoder:
    """An encoder with the weights of a checkpoint: whatever `read_encoder` reads. In evaluation mode."""
    encoder, _ = read_encoder(path)
    encoder.backend = backend
    return encoder.eval()


def infer_architecture(state: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Name, input channels and stem stride from an official state's shapes."""
    stem = state.get("downsample_layers.0.0.weight")
    if stem is None or stem.dim() != 4:
        raise UserError(f"{file} is not an encoder of ours: downsample_layers.0.0.weight is missing")
    depth = len({key.split(".")[2] for key in state if key.startswith("stages.2.")})
    for name, (depths, dims) in SIZES.items():
        if (depths[2], dims[0]) == (depth, stem.shape[0]):
            return {"name": name, "in_chans": stem.shape[1], "stem_stride": stem.shape[2]}
    raise UserError(f"{file} has {stem.shape[0]} channels and {depth} blocks in stage 3: no ConvNeXt V2 size has these")


def usage_example(encoder: SparseEncoder, folder: Path) -> str:
    """Code to paste that uses an exported encoder, and the commands that convert it."""
    height, width = encoder.image_size
    rows, cols = encoder.grid(height, width)
    layouts = ["huggingface"] if encoder.stem_stride == 2 else ["timm", "huggingface"]
    commands = [f"sparse-fcmae convert {quote(str(folder))} {quote(f'{folder}-{to}')} --to {to}" for to in layouts]
    return (
        "    import torch\n"
        "    from sparse_fcmae import load_encoder\n\n"
        f"    encoder = load_encoder({str(folder)!r})\n"
        f"    images = torch.randn(1, {encoder.in_chans}, {height}, {width})  # normalised as in config.json\n"
        f"    features = encoder(images)  # [1, {encoder.num_features}, {rows}, {cols}]\n\n"
        "or convert it\n\n" + "".join(f"    {command}\n" for command in commands)
    )


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    for file in (path / WEIGHTS, path / "exported" / WEIGHTS):
        if file.is_file():
            return file
    checkpoint = RunFolder(path).latest()
    if checkpoint is None:
        raise UserError(f"{path} holds no {WEIGHTS}, exported encoder or checkpoint")
    return checkpoint / WEIGHTS


def _options(file: Path) -> dict[str, Any]:
    """What shapes do not tell, from the config beside an exported encoder or of a checkpoint's run."""
    for config in (file.parent / CONFIG, file.parent.parent.parent / CONFIG):
        if config.is_file():
            found = read_json(config)
            if "image_size" in found and "grn_scope" in found:
                return {"image_size": image_size_of(found["image_size"]), "grn_scope": found["grn_scope"]}
    return {}


def _both_ways(encoder: nn.Module, state: dict[str, Tensor]) -> list[tuple[set[str], set[str]]]:
    have, want = set(state), set(encoder.state_dict())
    return [(want, have), (have, want)]


def _load_exactly(encoder: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    for key, value in encoder.state_dict().items():
        if state[key].shape != value.shape:
            raise UserError(f"{file}: {key} is {list(state[key].shape)}, not {list(value.shape)}")
    encoder.load_state_dict(state)


def _check_destination(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file: name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{target} is not empty: choose another folder or give --overwrite")
        foreign = {p.name for p in target.iterdir()} - {WEIGHTS, CONFIG, PROCESSOR}
        if foreign:
            raise UserError(f"{target} holds more than a conversion ({min(foreign)}): choose another folder")
