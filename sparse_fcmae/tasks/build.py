"""The models that tasks start with, and their views of images in training and in evaluation."""

from collections.abc import Callable, Sized
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_fcmae import __version__
from sparse_fcmae.data.config import NATIVE_SCALE, RATIOS, ViewConfig, range_of
from sparse_fcmae.data.decoders.image import Reading, reading_of
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.opening import is_named
from sparse_fcmae.data.sources.pages import labelled_by_page
from sparse_fcmae.data.survey import asked_reading, reading_options, survey
from sparse_fcmae.data.views import Augment, CentreView, NativeView, RandomView, default_crop_fraction
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.convnext import name_of, size_of
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.model.flops import count
from sparse_fcmae.model.segmenter import Segmenter
from sparse_fcmae.runtime.device import loader_processes
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of, shown_size
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.tasks.config import MODELS, FinetuneConfig, PlanConfig, PretrainConfig
from sparse_fcmae.tasks.recipes import finetuning_recipe
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.weights.read import read_weights

STEM = "downsample_layers.0.0.weight"
WIDE = 96  # channels of the first stage from which on UperNet is as wide as published
CPU = torch.device("cpu")


def options_of_weights(path: str | Path) -> dict[str, Any]:
    """The options of pretraining under which a model has the shape of these weights, whatever its channels."""
    found = read_weights(path, whole=True).architecture
    name = found["name"]
    size = {"model": name} if name in MODELS else dict(zip(("depths", "dims"), written(name), strict=True))
    return size | {name: found[name] for name in ("image_size", "stem_stride")}


def model_name(config: PretrainConfig | FinetuneConfig) -> str:
    """The name of the size that the options ask for, as `size_of` takes it. Raises UserError for impossible numbers."""
    numbers = list(size_of(config.model))
    for i, name in enumerate(("depths", "dims")):
        if given := getattr(config, name):
            try:
                numbers[i] = tuple(int(part) for part in given.split(","))
            except ValueError:
                numbers[i] = ()
            if len(numbers[i]) != 4 or min(numbers[i]) < 1:
                raise UserError(f"`{name}` {given}: give four numbers with commas between them, as 3,3,9,3")
    return name_of(*numbers)


def written(name: str) -> tuple[str, str]:
    """`depths` and `dims` of a size, as the options have them."""
    depths, dims = (",".join(map(str, numbers)) for numbers in size_of(name))
    return depths, dims


def format_of_run(config: PretrainConfig, source: ImageSource) -> tuple[ImageFormat, list[str]]:
    """The images that pretraining takes: those of the run that is resumed, or what its source is found to hold."""
    if config.resume:
        saved = RunFolder(config.out, config.kind).saved_options() or {}
        known = saved.get("images")  # which runs of earlier versions have not
        return (ImageFormat.of_json(known) if known else ImageFormat.imagenet(config.in_chans)), []
    weights = read_weights(config.init, whole=True).form if config.init else None
    return survey(source, config, config.seed, weights, config.max_bad_images)


def build_fcmae(config: PretrainConfig, resumed: bool, device: torch.device = CPU) -> tuple[FCMAE, list[str]]:
    """The model that pretraining starts with, and what there is to say about its weights.

    resumed: the weights come from the run's checkpoint, so those of `init` are not needed. device: where they are; on
    "meta" there are shapes alone.
    """
    torch.manual_seed(config.seed)
    with device:
        model = FCMAE(
            model_name(config),
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
            grn=config.grn,
            layer_scale=config.layer_scale,
            sparse=config.sparse,
        )
    return model, [] if resumed or not config.init else load_into(model, config.init)


def training_flops(config: PretrainConfig | PlanConfig, model: FCMAE) -> float:
    """Operations of an image's forward and backward pass, as counted in `model.flops`, two for a MAC."""
    size, drawn = model.encoder.image_size, None
    if model.mask_grid or model.mask_patch_size:  # the mean over masks is known of those that are drawn patch by patch
        drawn = model.draw_mask(256, size, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    parts = count(
        model.encoder.name,
        image_size=size,
        mask=drawn,
        mask_ratio=config.mask_ratio,
        in_chans=model.encoder.in_chans,
        stem_stride=config.stem_stride,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
    )
    encoder = parts["encoder"].sparse if model.sparse else parts["encoder"].dense
    return 6 * (encoder + parts["decoder"].sparse)  # the backward pass is twice the forward


def load_into(model: FCMAE, path: str) -> list[str]:
    """Gives a model the encoder of any checkpoint and, where it has a decoder of the same shape, that decoder too.

    Returns what there is to say about it. Raises UserError where the checkpoint is of another architecture.
    """
    weights = read_weights(path, whole=True)
    there, here = (size_of(name) for name in (weights.architecture["name"], model.encoder.name))
    if there != here:
        name, (depths, dims) = weights.architecture["name"], written(weights.architecture["name"])
        remedy = (
            f"`model={name}` without `depths` and `dims`" if name in MODELS else f"`depths={depths}` and `dims={dims}`"
        )
        raise UserError(f"`init` {path} is of the size {name}, not {model.encoder.name}: give {remedy}")
    for name in ("stem_stride", "grn", "layer_scale"):
        there, here = weights.architecture[name], getattr(model.encoder, name)
        if there != here:
            remedy = "leave `layer_scale` out" if (name, there) == ("layer_scale", False) else f"give `{name}={there}`"
            raise UserError(f"`init` {path} has `{name}` {there}, not {here}: {remedy}")
    encoder, notes = weights.without("norm", "head", "decoder"), list(weights.notes)
    stem, in_chans = encoder[STEM], model.encoder.in_chans
    if stem.shape[1] != in_chans:
        encoder[STEM] = stem_for(stem, in_chans)
        how = "summed" if in_chans == 1 else "repeated and scaled"
        notes.append(f"the stem's weights of {stem.shape[1]} channels are {how} for {in_chans}")
    give(model.encoder, encoder)
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("encoder.")}
    decoder = {key: value for key, value in weights.state.items() if key in own}
    fits = {key: value.shape for key, value in decoder.items()} == {key: value.shape for key, value in own.items()}
    if fits:
        give(model, decoder, strict=False)
        return [f"going on from the encoder and decoder of {path}", *notes]
    return [f"going on from the encoder of {path}", "new decoder", *notes]


def give(model: nn.Module, state: dict[str, Tensor], strict: bool = True) -> None:
    """Loads weights into a model, unless it has shapes alone."""
    if not next(model.parameters()).is_meta:
        model.load_state_dict(state, strict=strict)


def stem_for(stem: Tensor, in_chans: int) -> Tensor:
    """A stem's weights [D, C, S, S] for other channels, as timm adapts them.

    For one channel it is their sum. For several they are repeated in turn and scaled by C / in_chans, so that the
    features keep their size.
    """
    channels = stem.shape[1]
    if in_chans == 1:
        return stem.sum(1, keepdim=True)
    return stem[:, [number % channels for number in range(in_chans)]] * (channels / in_chans)


def build_classifier(
    config: FinetuneConfig,
    images: Labelled,
    classes: tuple[str, ...],
    checkpoint: Path | None = None,
    device: torch.device = CPU,
) -> tuple[Classifier, ImageFormat, FinetuneConfig, list[str]]:
    """The classifier that fine-tuning starts with, the images that it takes, the config without open ends, and what to
    say about the weights.

    classes: the names of the outputs. The head of the weights is kept where it is for these in the same task, or for as
    many whose names are not known. Where there
    is a checkpoint of the run, the weights are its own, and there is nothing to say about them. device: as in
    `build_fcmae`.
    """
    source = checkpoint or config.init
    if source is None:
        form, remarks = survey(
            labelled_by_page(images, asked_reading(config)), config, config.seed, max_bad_images=config.max_bad_images
        )
        weights, size, notes = None, (224, 224), ["starting from random weights", *remarks]
        shape = {"name": model_name(config), "in_chans": form.in_chans, "stem_stride": config.stem_stride}
        shape |= {"grn": config.grn, "layer_scale": config.layer_scale}
    else:
        weights = read_weights(source)
        form, notes = weights.form, list(weights.notes)
        shape = {**weights.architecture, "grn_scope": "image"}
        size = shape.pop("image_size")
    config, recipe = finetuning_recipe(config, shape["name"], len(images) if config.max_steps else 0)
    size = image_size_of(config.image_size) if config.image_size else size
    options = {"image_size": size, "backend": config.backend, "drop_path": config.drop_path}
    torch.manual_seed(config.seed)
    with device:
        model = Classifier(**shape, **options, num_classes=len(classes))
    if weights:
        fits = weights.num_classes == len(classes) and weights.classes in (None, classes)
        fits = fits and (checkpoint is not None or (config.task != "regression" and weights.task == config.task))
        give(model, weights.without("decoder", *([] if fits else ["head"])), strict=False)
        notes.insert(0, f"starting from the {'encoder and head' if fits else 'encoder'} of {source}")
        what = "a number" if config.task == "regression" else f"{len(classes)} classes"
        notes += [] if fits else [f"new head for {what}"]
    if config.freeze_encoder:
        model.requires_grad_(False)
        model.norm.requires_grad_(True)
        model.head.requires_grad_(True)
    crop = config.crop or ("native" if form.native else "resized")
    config = replace(config, image_size=shown_size(size), in_chans=form.in_chans, crop=crop)
    form = replace(form, native=crop == "native")
    return model, form, config, ([] if checkpoint else notes) + recipe


def build_segmenter(
    config: FinetuneConfig,
    images: ImageSource,
    classes: Callable[[Reading], Sized],
    checkpoint: Path | None = None,
) -> tuple[Segmenter, ImageFormat, FinetuneConfig, list[str]]:
    """The segmentation model that fine-tuning starts with, and what else `build_classifier` gives.

    classes: finds the classes of the masks, given as what their images are read.
    """
    source = checkpoint or config.init
    if source is None:
        form, remarks = survey(images, config, config.seed, max_bad_images=config.max_bad_images)
        weights, size, notes = None, (224, 224), ["starting from random weights", *remarks]
        shape = {"name": model_name(config), "in_chans": form.in_chans, "stem_stride": config.stem_stride}
        shape |= {"grn": config.grn, "layer_scale": config.layer_scale}
    else:
        weights = read_weights(source)
        form, notes = weights.form, [f"starting from the encoder of {source}", *weights.notes]
        shape = {**weights.architecture, "grn_scope": "image"}
        size = shape.pop("image_size")
    if reading_of(form, **reading_options(config)).pages == "images":
        raise UserError("`pages=images`: pages can't be paired with masks, so save them as files")
    config, recipe = finetuning_recipe(config, shape["name"], len(images) if config.max_steps else 0)
    size = image_size_of(config.image_size) if config.image_size else size
    head_channels = config.head_channels or (512 if size_of(shape["name"])[1][0] >= WIDE else 128)
    options = {"image_size": size, "backend": config.backend, "drop_path": config.drop_path}
    found = classes(reading_of(form, **reading_options(config)))
    torch.manual_seed(config.seed)
    model = Segmenter(**shape, **options, num_classes=len(found), head_channels=head_channels)
    if weights:
        model.backbone.load_state_dict(weights.without("norm", "head", "decoder"))
    model.backbone.requires_grad_(not config.freeze_encoder)
    crop = config.crop or ("native" if form.native else "resized")
    config = replace(
        config, image_size=shown_size(size), in_chans=form.in_chans, crop=crop, head_channels=head_channels
    )
    return model, replace(form, native=crop == "native"), config, ([] if checkpoint else notes) + recipe


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A model whose weights follow those of `model` as an exponential moving average, after each step by 1 - decay.

    So do the statistics of its batch norms, as those of other weights would not suit them.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def training_view(
    config: ViewConfig, size: tuple[int, int], form: ImageFormat, augment: Augment | None = None
) -> RandomView | NativeView:
    """How a run of this config looks at images that it is trained on. Raises UserError for impossible ranges."""
    reading, turns = reading_of(form, **reading_options(config)), {"hflip": config.hflip, "rotate": config.rotate}
    scale, ratios = range_of("scale", config.scale, NATIVE_SCALE), range_of("crop_ratio", config.crop_ratio, RATIOS)
    if config.crop == "native":
        usual = {f.name: f.default for f in fields(type(config))}
        if given := [name for name in ("crop_ratio", "min_crop") if getattr(config, name) != usual[name]]:
            raise UserError(f"`{given[0]}` goes with `crop=resized` alone")
        enough = {"min_valid": config.min_valid, "min_std": config.min_std, "std": form.std}
        return NativeView(size, reading, scale, augment=augment, **enough, **turns)
    if given := [name for name in ("scale", "min_valid", "min_std") if getattr(config, name)]:
        raise UserError(f"`{given[0]}` goes with `crop=native` alone")
    return RandomView(size, reading, config.min_crop, augment, ratios, **turns)


def evaluation_view(
    config: RunConfig, size: tuple[int, int], form: ImageFormat, device: torch.device
) -> EvaluationView:
    """How a run of this config looks at images that it is evaluated on."""
    reading = reading_of(form, **reading_options(config))
    batch_bytes = config.micro_batch_size * CentreView(size, reading).nbytes
    return EvaluationView(
        size,
        form,
        reading,
        default_crop_fraction(size),
        device,
        bf16=config.dtype == "bf16",
        batch_size=config.micro_batch_size,
        num_workers=loader_processes(device, config.num_workers, batch_bytes)[0],
        native=config.crop == "native",
    )


def origin_of(
    config: PretrainConfig | FinetuneConfig, how: str, images: str, names: tuple[str, ...]
) -> tuple[str, ...]:
    """How the weights of a run came about, in sentences for a model card. names: the options that it names."""
    data = [config.data] if is_named(config.data) and isinstance(config.data, str) else config.data
    folders = " and ".join(Path(name).name for name in data) if is_named(data) else "a data set in Python"
    begun = f"from the weights {Path(config.init).name}" if config.init else "from random weights"
    options = ", ".join(f"{name.replace('_', ' ')} {getattr(config, name)}" for name in names)
    return (f"It was {how} by sparse-fcmae {__version__}, {begun}, on {images} of {folders}.", f"Options: {options}.")
