"""The models that tasks start with, and their views of images in training and in evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_fcmae.data.config import ratios_of
from sparse_fcmae.data.views import Augment, RandomView, default_crop_fraction
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.runtime.device import loader_processes
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of, shown_size
from sparse_fcmae.tasks.config import FinetuneConfig, PretrainConfig
from sparse_fcmae.tasks.recipes import finetuning_recipe
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.weights.read import read_weights


def options_of_weights(path: str | Path) -> dict[str, Any]:
    """The options of pretraining under which a model has the shape of these weights."""
    found = read_weights(path, whole=True).architecture
    return {"model": found["name"], **{name: found[name] for name in ("image_size", "in_chans", "stem_stride")}}


def build_fcmae(config: PretrainConfig, resumed: bool) -> tuple[FCMAE, list[str]]:
    """The model that pretraining starts with, and what there is to say about its weights.

    resumed: the weights come from the run's checkpoint, so those of `init` are not needed.
    """
    check_channels(config.in_chans)
    torch.manual_seed(config.seed)
    model = FCMAE(
        config.model,
        image_size=image_size_of(config.image_size),
        in_chans=config.in_chans,
        mask_ratio=config.mask_ratio,
        backend=config.backend,
        mask_patch_size=config.mask_patch_size,
        mask_grid=config.mask_grid,
        norm_pix_loss=config.norm_pix_loss,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        stem_stride=config.stem_stride,
        grn_scope=config.grn_scope,
    )
    return model, [] if resumed or not config.init else load_into(model, config.init)


def load_into(model: FCMAE, path: str) -> list[str]:
    """Gives a model the encoder of any checkpoint and, where it has a decoder of the same shape, that decoder too.

    Returns what there is to say about it. Raises UserError where the checkpoint is of another architecture.
    """
    weights = read_weights(path, whole=True)
    weights.check_usable(path)
    for name in ("name", "in_chans", "stem_stride"):
        there, here = weights.architecture[name], getattr(model.encoder, name)
        if there != here:
            option = "model" if name == "name" else name
            raise UserError(f"`init` {path} has `{option}` {there}, not {here}: give `{option}={there}`")
    model.encoder.load_state_dict(weights.without("norm", "head", "decoder"))
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")}
    decoder = {key: value for key, value in weights.state.items() if key in own}
    fits = {key: value.shape for key, value in decoder.items()} == {key: value.shape for key, value in own.items()}
    if fits:
        model.load_state_dict(decoder, strict=False)
        return [f"going on from the encoder and decoder of {path}", *weights.notes]
    return [f"going on from the encoder of {path}", "new decoder", *weights.notes]


def build_classifier(
    config: FinetuneConfig, classes: tuple[str, ...], checkpoint: Path | None = None
) -> tuple[Classifier, FinetuneConfig, list[str]]:
    """The classifier that fine-tuning starts with, the config without open ends, and what to say about the weights.

    The head of the weights is kept where it is for these classes, or for as many whose names are not known. Where there
    is a checkpoint of the run, the weights are its own, and there is nothing to say about them.
    """
    torch.manual_seed(config.seed)
    source = checkpoint or config.init
    if source is None:
        check_channels(config.in_chans)
        weights, size, notes = None, (224, 224), ["starting from random weights"]
        shape = {"name": config.model, "in_chans": config.in_chans, "stem_stride": config.stem_stride}
    else:
        weights = read_weights(source)
        weights.check_usable(source)
        shape, notes = {**weights.architecture, "grn_scope": "image"}, list(weights.notes)
        size = shape.pop("image_size")
    config, recipe = finetuning_recipe(config, shape["name"])
    size = image_size_of(config.image_size) if config.image_size else size
    options = {"image_size": size, "backend": config.backend, "drop_path": config.drop_path}
    model = Classifier(**shape, **options, num_classes=len(classes))
    if weights:
        fits = weights.num_classes == len(classes) and weights.classes in (None, classes)
        model.load_state_dict(weights.without("decoder", *([] if fits else ["head"])), strict=False)
        notes.insert(0, f"starting from the {'encoder and head' if fits else 'encoder'} of {source}")
        notes += [] if fits else [f"new head for {len(classes)} classes"]
    if config.freeze_encoder:
        model.requires_grad_(False)
        model.norm.requires_grad_(True)
        model.head.requires_grad_(True)
    return model, replace(config, image_size=shown_size(size)), ([] if checkpoint else notes) + recipe


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A model whose weights follow those of `model` as an exponential moving average, after each step by 1 - decay."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def check_channels(in_chans: int) -> None:
    """Raises UserError for channels that image files do not give."""
    if in_chans not in (1, 3):
        raise UserError(f"`in_chans` {in_chans}: image files give 3 channels (colour) or 1 (greyscale)")


def training_view(
    config: RunConfig, size: tuple[int, int], in_chans: int, augment: Augment | None = None
) -> RandomView:
    """How a run of this config looks at images that it is trained on. Raises UserError for impossible ratios."""
    return RandomView(
        size,
        in_chans,
        min_area=config.min_crop,
        augment=augment,
        ratios=ratios_of(config.crop_ratio),
        hflip=config.hflip,
        rotate=config.rotate,
        max_megapixels=config.max_megapixels,
    )


def evaluation_view(config: RunConfig, size: tuple[int, int], in_chans: int, device: torch.device) -> EvaluationView:
    """How a run of this config looks at images that it is evaluated on."""
    return EvaluationView(
        size,
        in_chans,
        default_crop_fraction(size),
        device,
        bf16=config.dtype == "bf16",
        batch_size=config.micro_batch_size,
        num_workers=loader_processes(device, config.num_workers),
        max_megapixels=config.max_megapixels,
    )
