"""The layout of the official dense models, which is this package's own, and the config that `load_encoder` reads."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from sparse_fcmae.weights.adapter import CONFIG, PROBLEM_TYPES, Adapter, Settings
from sparse_fcmae.weights.weights import Weights

STAGE_NORM = re.compile(r"norm[0-3]\.")
FORMAT = "sparse-fcmae"  # how the "format" of this package's configs begins, those of runs included


def model_config(weights: Weights) -> dict[str, Any]:
    """The arguments that make the model, and what it takes and gives."""
    kind = "classifier" if weights.num_classes else "encoder"
    config = {"format": f"{FORMAT} {kind}"} | weights.architecture | weights.form.as_json()
    if weights.num_classes:
        config |= {"num_classes": weights.num_classes, "classes": weights.classes}
        config |= {"problem_type": PROBLEM_TYPES[weights.task]}
    if weights.origin:
        config["origin"] = weights.origin
    return config


class Official(Adapter):
    """The official code's dense models. Pretraining models have the same names behind `encoder.`."""

    name = "official"
    variants = ((r"^encoder\.", ""),)
    telltale = re.compile(r"^(encoder\.)?downsample_layers\.0\.0\.weight$")
    wrapper = "model"
    configs: ClassVar = {CONFIG: model_config}
    keeps_grn_scope = keeps_blocks = keeps_task = True

    def read_config(self, config: dict[str, Any], folder: Path) -> Settings | None:
        if not str(config.get("format")).startswith(FORMAT):
            return None
        images = config.get("images") or config  # a run has its options at the top, `mean` and `std` among them
        scope = config.get("grn_scope", "image")
        names, origin = config.get("classes"), config.get("origin") or ()
        return Settings.of(config.get("image_size"), names, images, scope, origin, config.get("problem_type"))

    def usage(self, weights: Weights) -> str:
        what, call = ("classifier", "logits") if weights.num_classes else ("encoder", "features")
        return (
            f"from sparse_fcmae import load_{what}\n\n"
            f'{what} = load_{what}("FOLDER")\n'
            f'{call} = {what}({what}.preprocess("image.png"))'
        )

    def shapes_in(self, config: dict[str, Any]) -> dict[str, Any]:
        if str(config["format"]).endswith(" run"):  # what was asked for, where `init` may have said otherwise
            return {}
        return {name: config.get(name) for name in ("name", "in_chans", "stem_stride", "num_classes")}

    def recognises(self, names: Collection[str]) -> bool:
        """A model for pretraining has a mask token. Behind `encoder.` in any other model the encoder alone is ours."""
        return "downsample_layers.0.0.weight" in names or (super().recognises(names) and "mask_token" in names)

    def is_extra(self, name: str, names: Collection[str]) -> bool:
        return STAGE_NORM.match(name) is not None  # of the official code's backbone for segmentation
