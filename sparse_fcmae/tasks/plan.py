"""The command `plan`: what a pretraining run will take, before it is started: memory, time, checkpoints, data.

Operations and memory are counted (`model.flops`, `model.memory`). The speed is what the user has measured on one
device, or a share of the device's peak.
"""

from dataclasses import dataclass
from typing import Any

import torch

from sparse_fcmae.model.convnext import Block
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.model.flops import parameters
from sparse_fcmae.model.memory import STATES, kept
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import check, image_size_of, keywords_of
from sparse_fcmae.tasks.build import model_name, training_flops
from sparse_fcmae.tasks.config import PlanConfig, PretrainConfig
from sparse_fcmae.tasks.recipes import pretraining_recipe
from sparse_fcmae.training.progress import shown_time

PYTORCH = 0.6e9  # bytes that PyTorch and its libraries take, on a GPU for its context
H100 = 989.0  # TFLOP/s in bfloat16
HOURS = 3600
DAYS = 24 * HOURS


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. gathered: parameters of other ranks' shards. images: what the micro-batch needs."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    images: float
    pytorch: float = PYTORCH

    @property
    def together(self) -> float:
        return self.weights + self.gradients + self.moments + self.gathered + self.images + self.pytorch


@keywords_of(PlanConfig)
def plan(options: dict[str, Any]) -> str:
    """What a pretraining run takes, as text. Raises UserError for what does not fit together."""
    config = PlanConfig(**options)
    check(config)
    size, devices = image_size_of(config.image_size), config.gpus
    recipe = PretrainConfig(data="images", batch_size=config.batch_size, epochs=config.epochs)
    recipe, _ = pretraining_recipe(recipe, config.images, devices)
    batch = recipe.batch_size
    if config.images < max(batch, devices):
        raise UserError(f"`images` {config.images} are less than a step's {batch} on {devices} devices: give more")
    if batch % devices:
        nearest = max(1, round(batch / devices)) * devices
        raise UserError(f"`batch_size` {batch} can't be divided evenly among {devices} devices: choose {nearest}")
    model = _model(config)
    flops = training_flops(config, model)
    tflops = config.tflops or (H100 if (config.device, config.dtype) == ("cuda", "bf16") else None)
    if not (tflops or config.images_per_second):
        raise UserError(
            f"the peak of a device for `device={config.device}` and `dtype={config.dtype}` is not known: give "
            "`images_per_second` as measured on one, or `tflops` and `efficiency`"
        )
    speed = config.images_per_second or config.efficiency * tflops * 1e12 / flops
    micro = min(config.micro_batch_size, batch // devices)
    steps = config.images // batch * recipe.epochs
    seconds = steps * batch / (speed * devices)
    hours = seconds * devices / HOURS
    time = f"{seconds / DAYS:,.1f} days" if seconds >= 2 * DAYS else shown_time(seconds)
    total = parameters(model)
    return "\n".join(
        [
            f"{model.encoder.name}, {total / 1e6:,.1f} M parameters with the decoder, images of "
            f"{size[0]}x{size[1]}, {config.dtype}",
            f"{steps:,} steps of {batch} images, {batch // devices} on each of {devices} devices, {micro} at once",
            "",
            *_table(config, model, micro),
            "",
            f"operations   {flops / 1e9:,.1f} GFLOP an image, forward and backward",
            f"speed        {speed:,.0f} images/s a device, {speed * devices:,.0f} together, "
            f"{batch / (speed * devices):.2f} s a step",
            f"time         {time}, {hours:,.{0 if hours > 10 else 2}f} GPU hours",
            f"checkpoint   {12 * total / 1e9:,.2f} GB, and as much of the machine's memory while it is written",
            f"data         {speed * devices * config.image_kb / 1e3:,.0f} MB/s of {config.image_kb:g} kB an image; "
            f"{config.images * config.image_kb / 1e9:,.2f} TB in all",
        ]
    )


def memory(config: PlanConfig, model: FCMAE, parallel: str, micro: int) -> Memory:
    """What one device holds of a model under `--parallel ddp`, `fsdp` or `hsdp`, with so many images at once."""
    shards = {"ddp": 1, "fsdp": config.gpus, "hsdp": min(config.gpus, config.gpus_per_machine)}[parallel]
    of_image = kept(
        model.encoder.name,
        grid=model.encoder.grid(*model.encoder.image_size),
        visible=model.num_visible(model.encoder.image_size),
        in_chans=model.encoder.in_chans,
        stem_stride=config.stem_stride,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        bf16=config.dtype == "bf16",
        device=config.device,
        checkpointed=config.grad_checkpointing,
    )
    total, gathered = parameters(model), 0.0
    if shards > 1:
        blocks = [parameters(module) for module in model.modules() if isinstance(module, Block)]
        # one block and the next, in the dtype of the products; what is around the blocks, in float32
        gathered = 2 * max(blocks) * (2 if config.dtype == "bf16" else 4) + 4 * (total - sum(blocks))
    states = {name: each * total / shards for name, each in STATES.items()}
    return Memory(**states, gathered=gathered, images=micro * of_image.together)


def _model(config: PlanConfig) -> FCMAE:
    """The model that the options ask for, of shapes alone."""
    with torch.device("meta"):
        return FCMAE(
            model_name(config),
            image_size=image_size_of(config.image_size),
            in_chans=config.in_chans or 3,
            mask_ratio=config.mask_ratio,
            stem_stride=config.stem_stride,
            decoder_dim=config.decoder_dim,
            decoder_depth=config.decoder_depth,
        )


def _table(config: PlanConfig, model: FCMAE, micro: int) -> list[str]:
    """A line for each way to spread the model, in GB a device, and how many images at once would fill it."""
    columns = (
        "weights",
        "gradients",
        "moments",
        "gathered",
        f"{micro} image" + "s" * (micro > 1),
        "PyTorch",
        "together",
        "images that fit",
    )
    machines, rest = divmod(config.gpus, config.gpus_per_machine)
    ways = ["ddp"] + (["fsdp"] if config.gpus > 1 else []) + (["hsdp"] if machines > 1 and not rest else [])
    rows = [("GB a device", *columns)]
    for way in ways:
        found, one = memory(config, model, way, micro), memory(config, model, way, 1)
        room = config.device_gb * 1e9 - (one.together - one.images)
        parts = (found.weights, found.gradients, found.moments, found.gathered, found.images, found.pytorch)
        numbers = [f"{part / 1e9:,.2f}" for part in (*parts, found.together)]
        rows.append((way, *numbers, f"{max(0, int(room // one.images)):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
