"""A fine-tuning step (forward, backward, AdamW) of this package's classifier against the same model of other libraries.

All candidates have the same weights and images and take turns. One whose logits are not ours in float32 is refused. A
library that can't be imported is named with the reason.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.benchmarks.timing import relative, take_turns
from sparse_fcmae.classifier import Classifier
from sparse_fcmae.config import CompareConfig, image_size_of
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import write_json
from sparse_fcmae.formats.layouts import LAYOUTS
from sparse_fcmae.formats.libraries import CONFIG, entry, huggingface_configs
from sparse_fcmae.formats.weights import Weights
from sparse_fcmae.training.distributed import choose_device
from sparse_fcmae.training.optim import adamw, set_lr

OURS = "sparse-fcmae"
CLASSES = 1000
TOLERANCE = 1e-5  # relative Frobenius error of the logits, float32


def compare(**options: Any) -> list[dict[str, Any]]:
    """Prints and returns a row a candidate; options are those of `CompareConfig`."""
    config = CompareConfig(**options)
    if config.batch_size < 1 or config.rounds < 1:
        raise UserError("--batch-size and --rounds must be at least 1")
    device, size = choose_device(config.device), image_size_of(config.image_size)
    torch.manual_seed(0)
    ours = Classifier(config.model, num_classes=CLASSES, image_size=size, drop_path=config.drop_path)
    with torch.no_grad():
        for parameter in ours.parameters():  # GRN and biases start at zero and would go unseen
            parameter.add_(0.02 * torch.randn_like(parameter))
    weights = Weights.of(ours)
    images = torch.randn(config.batch_size, 3, *size, device=device)
    labels = torch.randint(CLASSES, (config.batch_size,), device=device)
    expected = logits_of(ours.to(device), images)

    rows: dict[str, dict[str, Any]] = {}
    steps = {OURS: step(ours, images, labels, config)}
    for name, (make, memory_format) in CANDIDATES.items():
        try:
            model = make(weights, config.drop_path)
        except UserError as error:
            rows[name] = {"refused": str(error)}
            continue
        model, given = (x.to(device).to(memory_format=memory_format) for x in (model, images))
        error = relative(logits_of(model, given), expected)
        rows[name] = {"error": error}
        if error < TOLERANCE:
            steps[name] = step(model, given, labels, config)
        else:
            rows[name]["refused"] = f"its logits differ by {error:.0e}"
    times = take_turns(steps, config.rounds, device)
    rows = {OURS: {"error": 0.0}, **rows}
    for name in steps:
        median = statistics.median(times[name])
        rows[name] |= {"ms": 1e3 * median, "images_per_second": config.batch_size / median}
        rows[name]["ours_over_it"] = statistics.median(t / o for o, t in zip(times[OURS], times[name], strict=True))
    setting = {
        **{k: getattr(config, k) for k in ("model", "batch_size", "image_size", "dtype", "drop_path")},
        **{"device": str(device), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'a fine-tuning step of':22} {'ms':>9} {'images/s':>9} {'ours over it':>13}   error of logits")
    for name, row in rows.items():
        if "refused" in row:
            print(f"{name:22} refused: {row['refused']}")
        else:
            speed = f"{row['ms']:9.1f} {row['images_per_second']:9.1f} {row['ours_over_it']:13.2f}"
            print(f"{name:22} {speed}   {row['error']:.0e}")
    result = [{"candidate": name, **row} for name, row in rows.items()]
    if config.json:
        write_json(Path(config.json), {"setting": setting, "rows": result})
    return result


def from_timm(weights: Weights, drop_path: float) -> nn.Module:
    name = f"convnextv2_{weights.architecture['name']}"
    model = entry("timm", "create_model")(name, num_classes=CLASSES, drop_path_rate=drop_path)
    model.load_state_dict(LAYOUTS["timm"].convert(weights.state))
    return model


def from_transformers(weights: Weights, drop_path: float) -> nn.Module:
    options = huggingface_configs(weights)[CONFIG] | {"drop_path_rate": drop_path}
    config = entry("transformers", "ConvNextV2Config")(**options)
    model = entry("transformers", "ConvNextV2ForImageClassification")(config)
    model.load_state_dict(LAYOUTS["huggingface"].convert(weights.state))
    return model


CANDIDATES = {
    "timm": (from_timm, torch.contiguous_format),
    "timm, channels last": (from_timm, torch.channels_last),
    "transformers": (from_transformers, torch.contiguous_format),
}


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """A model's logits in evaluation mode, float32."""
    model.eval()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return call(model, images)


def call(model: nn.Module, images: Tensor) -> Tensor:
    result = model(images)
    return result if isinstance(result, Tensor) else result.logits


def step(model: nn.Module, images: Tensor, labels: Tensor, config: CompareConfig) -> Callable[[], None]:
    """One step of training on the images."""
    model.train()
    optimizer = adamw(model, 0.05, (0.9, 0.999))
    set_lr(optimizer, 1e-5)

    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            logits = call(model, images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
