"""Code and commands to paste that use what a run exported."""

from pathlib import Path
from shlex import quote
from typing import Any

from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.weights import architecture_of

SUGGESTED = ("timm", "huggingface")  # the targets that most users want


def usage_example(encoder: SparseEncoder, folder: Path) -> str:
    """What loads an exported encoder, and what converts it."""
    height, width = encoder.image_size
    rows, cols = encoder.grid(height, width)
    targets = [to for to in SUGGESTED if TARGETS[to].refusal(architecture_of(encoder)) is None]
    commands = [f"sparse-fcmae convert {quote(str(folder))} {quote(f'{folder}-{to}')} --to {to}" for to in targets]
    return (
        "    import torch\n"
        "    from sparse_fcmae import load_encoder\n\n"
        f"    encoder = load_encoder({str(folder)!r})\n"
        f"    images = torch.randn(1, {encoder.in_chans}, {height}, {width})  # normalised as in config.json\n"
        f"    features = encoder(images)  # [1, {encoder.num_features}, {rows}, {cols}]\n"
        + ("\nor convert it\n\n" if commands else "")
        + "".join(f"    {command}\n" for command in commands)
    )


def evaluate_and_predict(config: Any, folder: Path, out: str) -> str:
    """The commands that measure an exported model on what a run of this config held out, and that write its answers."""
    split = f" --val-split {config.val_split} --seed {config.seed}" if config.val_split else ""
    init = f"--init {quote(str(folder))}"
    masks = f" --masks {quote(config.masks)}" if config.masks else ""
    return (
        f"    sparse-fcmae evaluate --data {quote(str(config.data))}{masks} {init}{split}\n"
        f"    sparse-fcmae predict --data IMAGES {init} --out {out}\n"
    )


def classifier_example(
    model: Classifier, folder: Path, data: str, val_split: float | None, seed: int, reading: str = ""
) -> str:
    """What evaluates an exported classifier on the images that training held out, converts it and loads it.

    reading: further flags, of how the images are read, each with a space in front.
    """
    height, width = model.image_size
    split = "" if val_split is None else f" --val-split {val_split} --seed {seed}"
    return (
        f"    sparse-fcmae evaluate --init {quote(str(folder))} --data {quote(data)}{split}{reading}\n"
        f"    sparse-fcmae convert {quote(str(folder))} {quote(f'{folder}-huggingface')} --to huggingface\n\n"
        "or\n\n"
        "    import torch\n"
        "    from sparse_fcmae import load_classifier\n\n"
        f"    classifier = load_classifier({str(folder)!r})\n"
        f"    images = torch.randn(1, {model.in_chans}, {height}, {width})  # normalised as in config.json\n"
        f"    logits = classifier(images)  # [1, {model.num_classes}], the classes as in config.json\n"
    )
