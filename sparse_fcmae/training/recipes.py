"""Fine-tuning recipes by model size: the commands that the official code was published with (its TRAINING.md).

These name atto, tiny and base. Femto, pico and nano take atto's, large and huge base's with more stochastic depth.
"""

from dataclasses import replace
from typing import Any

from sparse_fcmae.config import FinetuneConfig
from sparse_fcmae.errors import UserError

ALL = {"random_erasing": 0.25, "rand_augment": 9.0, "ema_decay": 0.9999}
ATTO = ALL | {
    **{"epochs": 600, "warmup_epochs": 0.0, "base_lr": 2e-4, "weight_decay": 0.3},
    **{"layer_decay": 0.9, "layer_decay_type": "single", "drop_path": 0.1},
    **{"label_smoothing": 0.2, "mixup": 0.0, "cutmix": 0.0},
}
TINY = ALL | {
    **{"epochs": 300, "warmup_epochs": 40.0, "base_lr": 8e-4, "weight_decay": 0.05},
    **{"layer_decay": 0.9, "layer_decay_type": "single", "drop_path": 0.2},
    **{"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
}
BASE = TINY | {
    **{"epochs": 100, "warmup_epochs": 20.0, "base_lr": 6.25e-4},
    **{"layer_decay": 0.6, "layer_decay_type": "group", "drop_path": 0.1},
}
PROBE = {  # this package's own: crops and flips alone in front of a frozen encoder
    **{"epochs": 100, "warmup_epochs": 5.0, "base_lr": 1e-3, "weight_decay": 0.0},
    **{"layer_decay": 1.0, "layer_decay_type": "single", "drop_path": 0.0},
    **{
        "label_smoothing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "random_erasing": 0.0,
        "rand_augment": 0.0,
        "ema_decay": 0.0,
    },
}
PRESETS: dict[str, dict[str, Any]] = {
    **{"atto": ATTO, "femto": ATTO, "pico": ATTO, "nano": ATTO, "tiny": TINY},
    **{"base": BASE, "large": BASE | {"drop_path": 0.2}, "huge": BASE | {"drop_path": 0.3}, "probe": PROBE},
}


def complete(config: FinetuneConfig, model: str) -> FinetuneConfig:
    """The config with what was left open as the preset has it: the one asked for, else that of the model's size.

    A run shorter than the preset's warms up for the same share of it.
    """
    name = config.preset or ("probe" if config.freeze_encoder else model)
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: choose --preset {', '.join(PRESETS)}")
    preset = dict(PRESETS[name])
    if config.epochs is not None:
        preset["warmup_epochs"] *= min(1.0, config.epochs / preset["epochs"])
    return replace(config, **{k: v for k, v in preset.items() if getattr(config, k) is None})
