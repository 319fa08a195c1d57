"""timm: its layout of ConvNeXt V2, and the folder that `timm.create_model("local-dir:FOLDER")` loads."""

import re
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sparse_fcmae.data.views import default_crop_fraction
from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.model.convnext import SIZES, size_of
from sparse_fcmae.weights.adapter import CONFIG, Adapter, Outputs, Settings, entry, first_unlike, flat_grn
from sparse_fcmae.weights.weights import Weights, patch_size_of

CONV_MLP = {SIZES[name][1][0]: name for name in ("atto", "femto", "pico", "nano")}  # timm has 1x1 convolutions in these

# the arguments of timm's ConvNeXt with the values that make it ours, () where any does or the shapes show them
MODEL_ARGS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("in_chans", "num_classes", "depths", "dims", "patch_size", "conv_mlp", "drop_rate", "drop_path_rate"), ()
) | {
    "act_layer": ("gelu", None),
    "conv_bias": (True,),
    "global_pool": ("avg",),
    "head_hidden_size": (None,),
    "head_init_scale": (),
    "head_norm_first": (False,),
    "kernel_sizes": (7, [7, 7, 7, 7]),
    "ls_init_value": (None,),
    "norm_eps": (EPS, None),
    "norm_layer": ("layernorm", "layernorm2d", None),
    "output_stride": (32,),
    "stem_type": ("patch",),
    "use_grn": (True,),
}


def model_config(weights: Weights) -> dict[str, Any]:
    """The model, and in `pretrained_cfg` the images that it takes."""
    shape = weights.architecture
    mean, std = weights.form.in_units
    height, width = shape["image_size"]
    patch, (depths, dims) = patch_size_of(shape), size_of(shape["name"])
    like = shape["name"] if shape["name"] in SIZES else CONV_MLP.get(dims[0], "base")
    other = {} if like == shape["name"] else {"depths": depths, "dims": dims}
    pretrained = {
        "input_size": [shape["in_chans"], height, width],
        "pool_size": [height // patch, width // patch],
        "num_classes": weights.num_classes,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": default_crop_fraction(shape["image_size"]),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "other",
    }
    config = {
        "architecture": f"convnextv2_{like}",
        "num_classes": weights.num_classes,
        "num_features": dims[-1],
        "model_args": {"in_chans": shape["in_chans"], "patch_size": shape["stem_stride"], **other},
        "pretrained_cfg": pretrained,
    }
    if not weights.form.is_usual:
        config["image_format"] = weights.form.as_json()
    if weights.classes:
        config["label_names"] = weights.classes
    return config


class Timm(Adapter):
    """timm's ConvNeXt V2."""

    name = "timm"
    names = (
        (r"^downsample_layers\.0\.(\d)", r"stem.\1"),
        (r"^downsample_layers\.(\d)\.(\d)", r"stages.\1.downsample.\2"),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv1\.", ".mlp.fc1."),
        (r"\.grn\.gamma$", ".mlp.grn.weight"),
        (r"\.grn\.beta$", ".mlp.grn.bias"),
        (r"\.pwconv2\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
    )
    variants = ((r"^stem_(?=\d\.)", "stem."), (r"^stages_(?=\d\.)", "stages."))  # of `features_only=True`
    telltale = re.compile(r"^stem[._]0\.weight$")
    configs: ClassVar = {CONFIG: model_config}
    ends_in_norm = True
    library = hub_library = "timm"

    def pack(self, key: str, value: Tensor, width: int) -> Tensor:
        if width in CONV_MLP and re.search(r"pwconv\d\.weight$", key):
            return value[:, :, None, None]
        return flat_grn(key, value)

    def refusal(self, architecture: dict[str, Any], single: bool = False) -> str | None:
        if single or architecture["stem_stride"] != 2:
            return super().refusal(architecture, single)
        # timm would put a further downsampling before the first stage.
        return "timm's ConvNeXt V2 has no stem of stride 2: give `to=huggingface` or `to=official`"

    def read_config(self, config: dict[str, Any], folder: Path) -> Settings | None:
        if "pretrained_cfg" not in config:
            return None
        images = config["pretrained_cfg"]
        classes = config.get("label_names") or images.get("label_names")
        return Settings.of(images.get("input_size", ())[1:], classes, config.get("image_format") or images)

    def shapes_in(self, config: dict[str, Any]) -> dict[str, Any]:
        arguments = config.get("model_args", {})
        found = {name: arguments.get(name) for name in ("in_chans", "patch_size", "depths", "dims")}
        if not (arguments.get("depths") or arguments.get("dims")):
            found["architecture"] = config.get("architecture")
        return found | {"num_classes": config.get("num_classes") or None}

    def unlike(self, config: dict[str, Any]) -> str | None:
        name = str(config.get("architecture", "convnextv2"))
        if not name.startswith("convnextv2"):
            return f"architecture {name!r}, not one of convnextv2"
        return first_unlike(config.get("model_args", {}), MODEL_ARGS)

    def usage(self, weights: Weights) -> str:
        return 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'

    def run(self, path: Path, weights: Weights, images: Tensor) -> Outputs:
        model = entry("timm", "create_model")(f"local-dir:{path}", pretrained=True).eval()
        features = model.forward_features(images)
        return {"features": features, "logits" if weights.num_classes else "pooled": model.forward_head(features)}
