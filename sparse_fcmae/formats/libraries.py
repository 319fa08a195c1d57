"""What other libraries need beside the weights, and how each of them runs what was written for it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_fcmae.data import channel_stats, crop_share
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import one_line
from sparse_fcmae.formats.weights import CONFIG, PROCESSOR, Weights

MMPRETRAIN_CONFIG = "config.py"
Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> features [B, D, H, W], and logits or, without a head, norm


def stats_of(weights: Weights) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that the weights' images are normalised with."""
    return weights.stats or channel_stats(weights.architecture["in_chans"])


def official_configs(weights: Weights) -> dict[str, Any]:
    """What `load_encoder` reads."""
    mean, std = stats_of(weights)
    kind = "classifier" if weights.num_classes else "encoder"
    config = {"format": f"sparse-fcmae {kind}", **weights.architecture, "mean": mean, "std": std}
    if weights.num_classes:
        config |= {"num_classes": weights.num_classes, "classes": weights.classes}
    return {CONFIG: config}


def timm_configs(weights: Weights) -> dict[str, Any]:
    shape = weights.architecture
    if shape["stem_stride"] == 2:  # timm would put a further downsampling before the first stage
        raise UserError("timm's ConvNeXt V2 has no stem of stride 2: convert to huggingface or official")
    mean, std = stats_of(weights)
    height, width = shape["image_size"]
    patch = 8 * shape["stem_stride"]
    pretrained = {
        "input_size": [shape["in_chans"], height, width],
        "pool_size": [height // patch, width // patch],
        "num_classes": weights.num_classes,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": crop_share(shape["image_size"]),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "other",
    }
    config = {
        "architecture": f"convnextv2_{shape['name']}",
        "num_classes": weights.num_classes,
        "num_features": SIZES[shape["name"]][1][-1],
        "model_args": {"in_chans": shape["in_chans"], "patch_size": shape["stem_stride"]},
        "pretrained_cfg": pretrained,
    }
    if weights.classes:
        config["label_names"] = weights.classes
    return {CONFIG: config}


def huggingface_configs(weights: Weights) -> dict[str, Any]:
    shape = weights.architecture
    depths, dims = SIZES[shape["name"]]
    mean, std = stats_of(weights)
    side = min(shape["image_size"])
    config = {
        "model_type": "convnextv2",
        "architectures": ["ConvNextV2ForImageClassification" if weights.num_classes else "ConvNextV2Model"],
        "num_channels": shape["in_chans"],
        "patch_size": shape["stem_stride"],
        "num_stages": len(depths),
        "hidden_sizes": dims,
        "depths": depths,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "image_size": side,
        "torch_dtype": "float32",
    }
    if weights.num_classes:
        names = weights.classes or tuple(f"LABEL_{i}" for i in range(weights.num_classes))
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "crop_pct": crop_share(shape["image_size"]),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    return {CONFIG: config, PROCESSOR: processor}


def mmpretrain_configs(weights: Weights) -> dict[str, Any]:
    """The model's part of an mmpretrain config, to go on from with `_base_`."""
    shape = weights.architecture
    backbone = {"type": "ConvNeXt", "arch": shape["name"], "in_channels": shape["in_chans"]}
    backbone |= {"stem_patch_size": shape["stem_stride"], "use_grn": True, "layer_scale_init_value": 0.0}
    model: dict[str, Any] = {"type": "ImageClassifier", "backbone": backbone}
    if weights.num_classes:
        loss = {"type": "CrossEntropyLoss", "loss_weight": 1.0}
        model["head"] = {"type": "LinearClsHead", "num_classes": weights.num_classes}
        model["head"] |= {"in_channels": SIZES[shape["name"]][1][-1], "loss": loss}
    mean, std = ([255 * value for value in values] for values in stats_of(weights))
    preprocessor = {"mean": mean, "std": std, "to_rgb": shape["in_chans"] == 3}
    preprocessor |= {"num_classes": weights.num_classes} if weights.num_classes else {}
    return {MMPRETRAIN_CONFIG: f"model = {model!r}\ndata_preprocessor = {preprocessor!r}\n"}


def run_timm(create_model: Any, folder: Path, weights: Weights) -> Run:
    """The folder's model as timm's `create_model` makes it."""
    model = create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: ((features := model.forward_features(images)), model.forward_head(features))


def run_huggingface(model_class: Any, folder: Path, weights: Weights) -> Run:
    """The folder's model as transformers' `from_pretrained` makes it."""
    if not weights.num_classes:
        encoder = entry("transformers", "ConvNextV2Model").from_pretrained(folder).eval()
        return lambda images: ((output := encoder(images)).last_hidden_state, output.pooler_output)
    model = model_class.from_pretrained(folder).eval()
    return lambda images: (model.convnextv2(images).last_hidden_state, model(images).logits)


def entry(module: str, name: str) -> Any:
    """What a library offers under a name. Raises UserError with the reason where it can't be imported."""
    try:
        return getattr(importlib.import_module(module), name)  # some libraries import themselves at that point only
    except Exception as error:  # not installed, or, like torchvision beside another torch, unusable
        package = module.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise UserError(f"{package} is not installed: pip install {package}") from None
        raise UserError(f"{module} can't be imported ({one_line(error)})") from None


@dataclass(frozen=True)
class Library:
    """configs: file name -> content, JSON or text. weights: the weights' file in a folder. drops: parts of the weights
    that it has no place for. norm: whether its encoders end in a norm. wrapper: the key under which its .pt files hold
    the weights. module, name, run: its Python module, a name in it, and what makes its function of what has that name
    and a folder, where it is run."""

    configs: Callable[[Weights], dict[str, Any]]
    weights: str = "model.safetensors"
    drops: tuple[str, ...] = ("decoder",)
    norm: bool = False
    wrapper: str | None = None
    module: str = ""
    name: str = ""
    run: Callable[[Any, Path, Weights], Run] | None = None


LIBRARIES = {
    "official": Library(official_configs, wrapper="model"),
    "timm": Library(timm_configs, norm=True, module="timm", name="create_model", run=run_timm),
    "huggingface": Library(
        huggingface_configs,
        norm=True,
        module="transformers",
        name="ConvNextV2ForImageClassification",
        run=run_huggingface,
    ),
    "mmpretrain": Library(mmpretrain_configs, weights="model.pth", norm=True, wrapper="state_dict"),
    "fcmae": Library(official_configs, weights="model.pt", drops=("norm", "head"), wrapper="model"),
}
