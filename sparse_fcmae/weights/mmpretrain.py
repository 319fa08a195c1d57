"""mmpretrain: its layout of ConvNeXt V2, and the model's part of a config to go on from with `_base_`."""

import re
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from sparse_fcmae.model.convnext import SIZES, size_of
from sparse_fcmae.weights.adapter import Adapter, flat_grn
from sparse_fcmae.weights.weights import Weights

STAGE_NORM = re.compile(r"(backbone\.)?norm[0-3]\.")


def model_config(weights: Weights) -> str:
    """A Python file that defines `model` and `data_preprocessor`, as mmpretrain's configs are."""
    shape = weights.architecture
    depths, channels = size_of(shape["name"])
    model: dict[str, Any] = {
        "type": "ImageClassifier",
        "backbone": {
            "type": "ConvNeXt",
            "arch": shape["name"] if shape["name"] in SIZES else {"depths": list(depths), "channels": list(channels)},
            "in_channels": shape["in_chans"],
            "stem_patch_size": shape["stem_stride"],
            "use_grn": True,
            "layer_scale_init_value": 0.0,
        },
    }
    preprocessor: dict[str, Any] = {
        "mean": list(weights.form.mean),
        "std": list(weights.form.std),
        "to_rgb": weights.form.is_photograph and shape["in_chans"] == 3,  # as photographs are loaded in BGR there
    }
    if weights.num_classes:
        model["head"] = {
            "type": "LinearClsHead",
            "num_classes": weights.num_classes,
            "in_channels": channels[-1],
            "loss": {"type": "CrossEntropyLoss", "loss_weight": 1.0},
        }
        preprocessor["num_classes"] = weights.num_classes
    return f"model = {model!r}\ndata_preprocessor = {preprocessor!r}\n"


class MMPretrain(Adapter):
    """mmpretrain's ConvNeXt with the response norm. Its config is code, which is not read."""

    name = "mmpretrain"
    names = (
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
        (r"^norm\.", "norm3."),
        (r"^head\.", "head.fc."),
    )
    prefix = "backbone."
    variants = ((r"^(?=(downsample_layers|stages|norm3)\.)", "backbone."),)
    telltale = re.compile(r"\.depthwise_conv\.")
    weights_file = "model.pth"
    wrapper = "state_dict"
    configs: ClassVar = {"config.py": model_config}
    ends_in_norm = True

    def usage(self, weights: Weights) -> str:
        return '_base_ = ["FOLDER/config.py"]  # in a config of mmpretrain\nload_from = "FOLDER/model.pth"'

    def is_extra(self, name: str, names: Collection[str]) -> bool:
        """A backbone whose stages all have a norm has no final one: that of the last stage is one of them."""
        of_all = any(STAGE_NORM.match(other) and "norm3" not in other for other in names)
        return of_all and STAGE_NORM.match(name) is not None

    def pack(self, key: str, value: Tensor, width: int) -> Tensor:
        return flat_grn(key, value)
