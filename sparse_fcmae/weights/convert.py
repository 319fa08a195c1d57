"""Any checkpoint -> any layout: read, written beside its destination, run against its source, put in place."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import new_folder, writing
from sparse_fcmae.runtime.options import check
from sparse_fcmae.weights.adapter import CARD, Target
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.card import model_card
from sparse_fcmae.weights.config import ConvertConfig
from sparse_fcmae.weights.destination import Destination
from sparse_fcmae.weights.graph import GraphTarget
from sparse_fcmae.weights.read import read_weights, weights_file
from sparse_fcmae.weights.segmenter import holds_segmenter, read_segmenter
from sparse_fcmae.weights.upernet import write_upernet
from sparse_fcmae.weights.verify import verify
from sparse_fcmae.weights.weights import Weights, part_of


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    half: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> str:
    """Writes the weights of a checkpoint in the layout of a library; returns what was done, a line each.

    source: whatever `read_weights` reads.
    destination: a folder, or a file that ends in .safetensors, .pt or .pth, for ONNX in .onnx, for PyTorch's graphs in
        .pt2. It appears only after what was written has been run and found equal to the source (features and logits,
        fp32, 1e-5), by the real library too where that can be imported.
    to: "official", "timm", "huggingface", "mmpretrain", "fcmae", "onnx", "torch-export" or "aotinductor".
    half: float16, of the last three.
    overwrite: replace the files of an earlier conversion.
    dry_run: do and verify it all, and leave nothing.

    Raises UserError where anything is amiss, with `destination` untouched.
    """
    options = {"to": to, "half": half, "overwrite": overwrite, "dry_run": dry_run}
    check(ConvertConfig(source=str(source), destination=str(destination), **options))
    target = TARGETS[to]
    if half:
        if not isinstance(target, GraphTarget):
            raise UserError(f"`half` is of the graphs onnx, torch-export and aotinductor: leave it out for {to}")
        target = target.in_half()
    place = Destination(Path(destination), target)
    whole = "decoder" not in target.drops
    place.check(weights_file(Path(source), whole), overwrite)
    if to == "huggingface" and not place.is_file and holds_segmenter(source):
        with place.written_beside(dry_run) as path, writing(place.path):
            lines = write_upernet(read_segmenter(source), path)
        return "\n".join([f"read {source}: a segmentation model", *lines, _what_was_done(destination, dry_run)])
    weights = read_weights(source, whole=whole)
    if reason := target.refusal(weights.architecture, place.is_file):
        raise UserError(reason)
    lines = [_what_was_read(weights, source), *weights.notes, *target.losses(weights, place.is_file)]
    with place.written_beside(dry_run) as path:
        with writing(place.path):
            lines += write(weights, target, path)
        lines += verify(weights, target, path)
    return "\n".join([*lines, _what_was_done(destination, dry_run)])


def export_model(
    model: SparseEncoder,
    folder: Path,
    classes: tuple[str, ...] | None = None,
    form: ImageFormat | None = None,
    state: dict[str, Tensor] | None = None,
    origin: tuple[str, ...] = (),
    task: str = "classification",
) -> None:
    """Writes an encoder or classifier under the official names, with the config that `load_encoder` reads, verified.

    state: the weights, where the model does not have them, or has others. origin: how they came about, in sentences.
    task: as in `Weights`.
    """
    weights, target = replace(Weights.of(model, classes, form, state), origin=origin, task=task), TARGETS["official"]
    with new_folder(folder) as temporary:
        with writing(folder):
            write(weights, target, temporary)
        verify(weights, target, temporary)


def write(weights: Weights, target: Target, path: Path) -> list[str]:
    """Fills a folder that is there with the weights and their configs, or writes a file of the weights alone.

    Returns what was mapped, added and left out, a line each.
    """
    state, added = weights.without(*target.drops), []
    if target.ends_in_norm and "norm.weight" not in state:
        features = len(state["stages.3.0.norm.weight"])
        state |= {"norm.weight": torch.ones(features), "norm.bias": torch.zeros(features)}
        added = ["added the final norm as the identity, as the source has none"]
    fitting = replace(weights, state=state, classes=weights.classes if "head.weight" in state else None)
    if path.is_dir():
        done = target.save(fitting, path / target.weights_file)
        target.write_configs(fitting, path)
        (path / CARD).write_text(model_card(fitting, target))
    else:
        done = target.save(fitting, path)
    present = {part_of(key) for key in weights.state}
    return [done, *added, *(_left_out(part) for part in target.drops if part in present)]


def _what_was_read(weights: Weights, source: str | Path) -> str:
    shape = weights.architecture
    kind = f"classifier of {weights.num_classes}" if weights.num_classes else "encoder"
    if weights.has_decoder:
        kind += " with decoder"
    return (
        f"read {source}: {weights.layout} names, {kind}, {shape['name']}, {shape['in_chans']} input channels, "
        f"stem stride {shape['stem_stride']}, {len(weights.state)} tensors"
    )


def _what_was_done(destination: str | Path, dry_run: bool) -> str:
    return f"{'would write' if dry_run else 'wrote'} {destination}"


def _left_out(part: str) -> str:
    reason = "pretraining alone uses it" if part == "decoder" else "a model for pretraining has none"
    return f"left out the {part}: {reason}"
