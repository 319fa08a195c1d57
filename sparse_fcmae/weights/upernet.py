"""Segmentation models for transformers: the folder that its UperNetForSemanticSegmentation loads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.model.segmenter import AUXILIARY_STAGE
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, save_tensors, write_json
from sparse_fcmae.weights.adapter import CARD, CONFIG, TOLERANCE, entry
from sparse_fcmae.weights.card import segmenter_card
from sparse_fcmae.weights.huggingface import PROCESSOR, HuggingFace, model_config, processor_config
from sparse_fcmae.weights.segmenter import SegmenterWeights

STAGES = ("stage1", "stage2", "stage3", "stage4")
USAGE = (
    "from transformers import UperNetForSemanticSegmentation\n\n"
    'model = UperNetForSemanticSegmentation.from_pretrained("FOLDER")'
)


def write_upernet(weights: SegmenterWeights, folder: Path) -> list[str]:
    """Fills a folder with a segmentation model; returns what was done, a line each. Raises UserError where it differs.

    The classes are those of the outputs in their order: the values that masks have are not known there.
    """
    layout, encoder = HuggingFace(), weights.encoder
    if reason := layout.refusal(encoder.architecture):
        raise UserError(reason)
    state = named(weights, layout)
    save_tensors(state, folder / layout.weights_file)
    write_json(folder / CONFIG, upernet_config(weights))
    write_json(folder / PROCESSOR, processor_config(encoder) | {"crop_pct": 1.0})
    card = segmenter_card(encoder, weights.classes.names, sum(value.numel() for value in state.values()), USAGE)
    (folder / CARD).write_text(card)
    lines = [f"mapped {len(state)} tensors to the names of transformers' UperNet"]
    if weights.classes.values != tuple(range(len(weights.classes))):
        lines.append("the values that masks have are not kept: an output's number is its class's place among them")
    return [*lines, run_by_transformers(weights, folder)]


def named(weights: SegmenterWeights, layout: HuggingFace) -> dict[str, Tensor]:
    """All tensors under transformers' names."""
    inside = layout.from_official(weights.encoder.without("norm", "head", "decoder"))
    state = {f"backbone.{name.removeprefix(layout.prefix)}": value for name, value in inside.items()}
    for name, value in weights.state.items():
        if name.startswith("norms."):
            _, stage, part = name.split(".")
            state[f"backbone.hidden_states_norms.{STAGES[int(stage)]}.{part}"] = value
        elif not name.startswith("backbone."):
            state[name] = value
    return state


def upernet_config(weights: SegmenterWeights) -> dict[str, Any]:
    """The content of its config."""
    inside = model_config(weights.encoder) | {"out_features": list(STAGES)}
    del inside["architectures"]
    return {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": inside,
        "hidden_size": weights.head_channels,
        "pool_scales": [1, 2, 3, 6],
        "use_auxiliary_head": True,
        "auxiliary_in_channels": size_of(weights.encoder.architecture["name"])[1][AUXILIARY_STAGE],
        "auxiliary_channels": weights.state["auxiliary_head.classifier.weight"].shape[1],
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "loss_ignore_index": 255,
        "id2label": {str(place): name for place, name in enumerate(weights.classes.names)},
        "torch_dtype": "float32",
    }


@torch.no_grad()
def run_by_transformers(weights: SegmenterWeights, folder: Path) -> str:
    """Has transformers run what was written, and says that it equals what this package makes of the same images."""
    try:
        kind = entry("transformers", "UperNetForSemanticSegmentation")
    except UserError as error:
        return f"result not run by the library: {error}"
    model = weights.model()
    generator, patch = torch.Generator().manual_seed(0), model.backbone.patch_size
    images = torch.randn(2, model.backbone.in_chans, 2 * patch, 3 * patch, generator=generator)
    expected = model(images)
    try:
        found = kind.from_pretrained(folder).float().eval()(images).logits
    except Exception as error:
        raise UserError(f"not written: transformers does not take the result: {one_line(error)[:200]}") from None
    worst = ((found - expected).norm() / expected.norm()).item() if found.shape == expected.shape else float("inf")
    if not worst < TOLERANCE:
        raise UserError(f"not written: source and result differ by {worst:.1e} (result run by transformers)")
    return f"verified: result run by transformers, equal within {max(worst, 1e-9):.0e}"
