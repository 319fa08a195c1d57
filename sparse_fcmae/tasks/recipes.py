"""Recipes: what a run does where its user leaves it open.

Pretraining follows the number of images (`auto`) or the paper. Fine-tuning follows the commands that the official code
was published with (its TRAINING.md), which name atto, tiny and base. Femto, pico and nano take atto's recipe, large and
above take base's with more stochastic depth. A size without a name takes that of the widest one that is no wider.
"""

from dataclasses import replace
from typing import Any

from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import flag
from sparse_fcmae.tasks.config import MODELS, FinetuneConfig, PretrainConfig

PAPER_BATCH, PAPER_EPOCHS, PAPER_BASE_LR = 4096, 800, 1.5e-4  # ConvNeXt V2, appendix A
WARMUP = 0.05  # of the epochs: 40 of the paper's 800
STEPS_PER_EPOCH = 32  # that the automatic recipe gives an epoch, up to the paper's batch
LEAST_BATCH = 8
IMAGES_SEEN = 2_000_000  # over all epochs, with at least LEAST_EPOCHS and at most the paper's
LEAST_EPOCHS = 100


def pretraining_recipe(config: PretrainConfig, images: int, world: int) -> tuple[PretrainConfig, list[str]]:
    """The config without open ends for so many images and processes, and what there is to say about it, a line each.

    The automatic recipe makes the batch so small that an epoch has about STEPS_PER_EPOCH steps, and trains for
    IMAGES_SEEN images, as small sets need more epochs. It lowers the paper's peak learning rate with the fourth root of
    the batch, as a rate in proportion to a small batch learns little in so few steps.
    """
    found: dict[str, Any] = {}
    paper = config.recipe == "paper"
    batch = config.batch_size
    if batch is None:
        batch = found["batch_size"] = PAPER_BATCH if paper else _batch_for(images, world)
    if paper and config.batch_size is None and batch > images:
        raise UserError(
            f"the paper's recipe takes {batch} images a step, more than the {images} in {config.data}: give "
            "`batch_size`, or leave `recipe` out"
        )
    epochs = config.epochs
    if epochs is None:
        suitable = min(PAPER_EPOCHS, max(LEAST_EPOCHS, round(IMAGES_SEEN / images)))
        epochs = found["epochs"] = PAPER_EPOCHS if paper else suitable
    if config.warmup_epochs is None:
        found["warmup_epochs"] = WARMUP * (config.max_steps * batch / images if config.max_steps else epochs)
    if config.lr is None and config.base_lr is None:
        at_paper_batch = PAPER_BASE_LR * PAPER_BATCH / 256
        if paper:
            found["base_lr"] = PAPER_BASE_LR
        else:
            found["lr"] = float(f"{at_paper_batch * (batch / PAPER_BATCH) ** 0.25:.2g}")
    if not found:
        return config, []
    chosen = ", ".join(f"{flag(name)} {value:g}" for name, value in found.items())
    return replace(config, **found), [f"recipe {config.recipe} for {images} images: {chosen}"]


def _batch_for(images: int, world: int) -> int:
    """A batch of which an epoch has about STEPS_PER_EPOCH, of a power of two of images in each process."""
    wanted = max(LEAST_BATCH, images // STEPS_PER_EPOCH)
    of_process = max(1, min(wanted, images, PAPER_BATCH) // world)
    return world << (of_process.bit_length() - 1)


AUGMENTED = {"random_erasing": 0.25, "rand_augment": 9.0, "ema_decay": 0.9999}
ATTO = {
    **AUGMENTED,
    "epochs": 600,
    "warmup_epochs": 0.0,
    "base_lr": 2e-4,
    "weight_decay": 0.3,
    "layer_decay": 0.9,
    "layer_decay_type": "single",
    "drop_path": 0.1,
    "label_smoothing": 0.2,
    "mixup": 0.0,
    "cutmix": 0.0,
}
TINY = {
    **AUGMENTED,
    "epochs": 300,
    "warmup_epochs": 40.0,
    "base_lr": 8e-4,
    "weight_decay": 0.05,
    "layer_decay": 0.9,
    "layer_decay_type": "single",
    "drop_path": 0.2,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
}
BASE = {
    **TINY,
    "epochs": 100,
    "warmup_epochs": 20.0,
    "base_lr": 6.25e-4,
    "layer_decay": 0.6,
    "layer_decay_type": "group",
    "drop_path": 0.1,
}
PROBE = {  # this package's own: crops and flips alone in front of a frozen encoder
    "epochs": 100,
    "warmup_epochs": 5.0,
    "base_lr": 1e-3,
    "weight_decay": 0.0,
    "layer_decay": 1.0,
    "layer_decay_type": "single",
    "drop_path": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "random_erasing": 0.0,
    "rand_augment": 0.0,
    "ema_decay": 0.0,
}
SEGMENTATION = {  # mmsegmentation's for ConvNeXt on ADE20K in epochs, with the cosine that all runs here have
    "batch_size": 16,
    "epochs": 100,
    "warmup_epochs": 1.0,
    "base_lr": 1.6e-3,
    "weight_decay": 0.05,
    "layer_decay": 0.9,
    "layer_decay_type": "single",
    "drop_path": 0.1,
    "ema_decay": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "atto": ATTO,
    "femto": ATTO,
    "pico": ATTO,
    "nano": ATTO,
    "tiny": TINY,
    "base": BASE,
    "large": BASE | {"drop_path": 0.2},
    **dict.fromkeys(("huge", "giant", "gigantic"), BASE | {"drop_path": 0.3}),
    "probe": PROBE,
}
TOLD = (  # the options that a run's log tells as its recipe
    "batch_size",
    "epochs",
    "warmup_epochs",
    "lr",
    "base_lr",
    "weight_decay",
    "layer_decay",
    "layer_decay_type",
    "drop_path",
    "label_smoothing",
    "mixup",
    "cutmix",
    "rand_augment",
    "random_erasing",
    "min_crop",
    "ema_decay",
)


def nearest(model: str) -> str:
    """The named size whose recipe a model takes: its own, or the widest that is no wider."""
    width = size_of(model)[1][-1]
    return [name for name in MODELS if size_of(name)[1][-1] <= width or name == MODELS[0]][-1]


def finetuning_recipe(config: FinetuneConfig, model: str, images: int = 0) -> tuple[FinetuneConfig, list[str]]:
    """The config without open ends for a model's name, and what there is to say about it, a line each.

    What was left open is as the preset has it: the one asked for, else that of the model's size. A run shorter than the
    preset's warms up for the same fraction of it.
    """
    plain = {"multilabel": ("label_smoothing",), "regression": ("label_smoothing", "mixup", "cutmix")}
    if config.task == "segmentation":
        preset = dict(SEGMENTATION)
    else:
        preset = {"batch_size": 1024} | PRESETS[config.preset or ("probe" if config.freeze_encoder else nearest(model))]
    preset |= dict.fromkeys(plain.get(config.task, ()), 0.0)
    config = replace(config, batch_size=config.batch_size or preset["batch_size"])
    epochs = config.max_steps * config.batch_size / images if config.max_steps else config.epochs
    if epochs is not None:
        preset["warmup_epochs"] *= min(1.0, epochs / preset["epochs"])
    if config.lr is not None:
        del preset["base_lr"]
    config = replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})
    told = {name: getattr(config, name) for name in TOLD if getattr(config, name) is not None}
    return config, ["recipe: " + ", ".join(f"{flag(name)} {value}" for name, value in told.items())]
