"""Hugging Face transformers: its layout of ConvNeXt V2, and the folder that `from_pretrained` loads."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sparse_fcmae.data.format import BYTE
from sparse_fcmae.data.views import default_crop_fraction
from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.runtime.files import read_json
from sparse_fcmae.weights.adapter import CONFIG, PROBLEM_TYPES, Adapter, Outputs, Settings, entry, first_unlike
from sparse_fcmae.weights.weights import Weights

PROCESSOR = "preprocessor_config.json"
LIBRARYS_EPS = 1e-12  # of the final norm where a config does not say it; those before it have 1e-6
UNNAMED = "LABEL_{}"  # how transformers calls a class whose name is not known


def model_config(weights: Weights) -> dict[str, Any]:
    """The model. The library's default `layer_norm_eps` of 1e-12 would change its pooled output."""
    shape = weights.architecture
    depths, dims = size_of(shape["name"])
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
        "layer_norm_eps": EPS,
        "drop_path_rate": 0.0,
        "image_size": min(shape["image_size"]),
        "torch_dtype": "float32",
    }
    if weights.num_classes:
        names = weights.classes or [UNNAMED.format(i) for i in range(weights.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["problem_type"] = PROBLEM_TYPES[weights.task]
    return config


def processor_config(weights: Weights) -> dict[str, Any]:
    """What makes the images that the model takes."""
    mean, std = weights.form.in_units
    size = weights.architecture["image_size"]
    config = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(size)},
        "crop_pct": default_crop_fraction(size),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / weights.form.unit,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    if not weights.form.is_usual:
        config["image_format"] = weights.form.as_json()
    return config


def statistics_in(processor: dict[str, Any], channels: int) -> dict[str, Any]:
    """Mean and deviation that a processor's steps come to, of values between 0 and 1, as `Settings.of` takes them.

    None where there is no processor. Where it does not say them they are the library's 0.5.
    """
    if not processor:
        return {}
    mean, std = (processor.get(name) or [0.5] * channels for name in ("image_mean", "image_std"))
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    factor = BYTE * processor.get("rescale_factor", 1 / BYTE) if processor.get("do_rescale", True) else BYTE
    return {"mean": [value / factor for value in mean], "std": [value / factor for value in std]}


class HuggingFace(Adapter):
    """transformers' ConvNextV2ForImageClassification, and ConvNextV2Model for an encoder."""

    name = "huggingface"
    names = (
        (r"^downsample_layers\.0\.0", "embeddings.patch_embeddings"),
        (r"^downsample_layers\.0\.1", "embeddings.layernorm"),
        (r"^downsample_layers\.(\d)\.(\d)", r"encoder.stages.\1.downsampling_layer.\2"),
        (r"^stages\.(\d)\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
        (r"^stages\.(\d)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
        (r"\.grn\.gamma$", ".grn.weight"),
        (r"\.grn\.beta$", ".grn.bias"),
        (r"^norm\.", "layernorm."),
        (r"^head\.", "classifier."),
    )
    prefix = "convnextv2."
    variants = ((r"^(?=(embeddings|encoder|layernorm)\.)", "convnextv2."),)
    telltale = re.compile(r"^(convnextv2\.)?embeddings\.")
    configs: ClassVar = {CONFIG: model_config, PROCESSOR: processor_config}
    ends_in_norm = True
    keeps_task = True
    library = hub_library = "transformers"

    def losses(self, weights: Weights, single: bool) -> list[str]:
        lines = super().losses(weights, single)
        height, width = weights.architecture["image_size"]
        if height != width and not single:
            lines.append(f"the image size becomes {min(height, width)}, as it knows squares only")
        return lines

    def read_config(self, config: dict[str, Any], folder: Path) -> Settings | None:
        if config.get("model_type") != "convnextv2":
            return None
        names = {int(number): name for number, name in config.get("id2label", {}).items()}
        if sorted(names) != list(range(len(names))):
            raise ValueError("id2label does not count its classes from 0")
        classes = [names[number] for number in range(len(names))]
        processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
        return Settings.of(
            config.get("image_size"),
            None if classes[:1] == [UNNAMED.format(0)] else classes,
            processor.get("image_format") or statistics_in(processor, config.get("num_channels", 3)),
            problem=config.get("problem_type"),
        )

    def shapes_in(self, config: dict[str, Any]) -> dict[str, Any]:
        found = {name: config.get(name) for name in ("depths", "hidden_sizes", "patch_size", "num_channels")}
        return found | {"classes in id2label": len(config.get("id2label", ())) or None}

    def is_extra(self, name: str, names: Collection[str]) -> bool:
        return name.startswith("hidden_states_norms.")  # of ConvNextV2Backbone

    def norm_eps(self, config: dict[str, Any]) -> float:
        return config.get("layer_norm_eps", LIBRARYS_EPS)

    def unlike(self, config: dict[str, Any]) -> str | None:
        if not 0 < self.norm_eps(config) <= EPS:
            return f"layer_norm_eps {config['layer_norm_eps']!r}, not {EPS} or less"
        return first_unlike({"hidden_act": config.get("hidden_act", "gelu")}, {"hidden_act": ("gelu",)})

    def usage(self, weights: Weights) -> str:
        name = "AutoModelForImageClassification" if weights.num_classes else "AutoModel"
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("FOLDER")'

    def run(self, path: Path, weights: Weights, images: Tensor) -> Outputs:
        if weights.num_classes:
            model = entry("transformers", "ConvNextV2ForImageClassification").from_pretrained(path).float().eval()
            return {"features": model.convnextv2(images).last_hidden_state, "logits": model(images).logits}
        output = entry("transformers", "ConvNextV2Model").from_pretrained(path).float().eval()(images)
        return {"features": output.last_hidden_state, "pooled": output.pooler_output}
