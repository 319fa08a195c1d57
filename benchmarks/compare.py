"""A whole training step of this package against what a user would take instead: fine-tuning, or pretraining.

All candidates have the same images and take turns. Every step is a `TrainStep`: forward and backward pass and AdamW,
and for pretraining the masks too. A model with our weights has to give the logits of dense convolution in float32, and
the loss of one of another architecture has to fall.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.benchmarks.config import CompareConfig
from sparse_fcmae.benchmarks.engine import Candidate, Run, benchmark, take_turns
from sparse_fcmae.benchmarks.gates import LOGITS, falling_loss, relative
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import Training, move_parameters
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.model.flops import count, module_macs
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import image_size_of
from sparse_fcmae.weights.adapter import CONFIG, entry
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.weights import Weights

OURS = "sparse-fcmae"
CLASSES = 1000
GATE_BATCH = 8  # images whose logits are compared
LR = 1e-4
MASKED, MAE_MASKED = 0.6, 0.75  # as their papers have it
MVITS = {"tiny": "mvitv2_tiny", "base": "mvitv2_base", "large": "mvitv2_large", "huge": "mvitv2_huge_cls"}  # by GMACs
VITS = {  # our size: their name, width, layers, heads, patch
    "base": ("ViT-B/16", 768, 12, 12, 16),
    "large": ("ViT-L/16", 1024, 24, 16, 16),
    "huge": ("ViT-H/14", 1280, 32, 16, 14),
}
SETTING = ("task", "model", "batch_size", "image_size", "dtype", "drop_path")
COLUMNS: Columns = {
    "candidate": ("a training step of", ""),
    "model": ("size", ""),
    "batch_size": ("batch", "d"),
    "image_size": ("pixels", ">"),
    "dtype": ("dtype", ""),
    "gmacs": ("GMACs", ".2f"),
    "ms": ("ms", ".1f"),
    "p20_ms": ("20 %", ".1f"),
    "p80_ms": ("80 %", ".1f"),
    "images_per_second": ("images/s", ".1f"),
    "ours_over_it": ("ours over it", ".2f"),
    "error": ("error of logits", ".0e"),
}


@benchmark("compare", CompareConfig, COLUMNS)
def compare(config: CompareConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns a row for each candidate, ours first.

    gmacs: 1e9 multiply-accumulates of one image's forward pass. ours_over_it: its time by ours, the median of the
    rounds' ratios. Raises UserError for options that make no sense; what can't be measured has a row with the reason.
    """
    if config.task == "pretrain" and config.drop_path:
        raise UserError("`drop_path` is of `task=finetune`: pretraining has none")
    setting = {name: getattr(config, name) for name in SETTING}
    candidates = [
        replace(candidate, row={"candidate": candidate.name} | setting, images=config.batch_size)
        for candidate in TASKS[config.task](config, image_size_of(config.image_size), device)
    ]
    turns, ours = take_turns(candidates, config.rounds, device), candidates[0].name
    yield turns.table(lambda name: turns.spread(name) | {"ours_over_it": turns.ratio(name, ours)})


def finetuning(config: CompareConfig, size: tuple[int, int], device: torch.device) -> Iterator[Candidate]:
    """Dense training of a classifier: ConvNeXt V2 with the same weights, MViTv2 of like size with its own."""
    ours = move_parameters(Classifier(config.model, num_classes=CLASSES, image_size=size, drop_path=config.drop_path))
    weights = Weights.of(copy.deepcopy(ours))  # which training leaves as they are
    images = torch.randn(config.batch_size, 3, *size, device=device)
    labels = torch.randint(CLASSES, (config.batch_size,), device=device)
    expected = logits_of(ours.to(device).with_backend("masked"), images[:GATE_BATCH])
    macs = count(config.model, image_size=size, num_classes=CLASSES, mask_ratio=0)["classifier"].dense
    build = partial(training, config, (images, labels))
    yield Candidate(OURS, partial(build, lambda: ours), gate=partial(gate, expected, macs))
    for name, (make, layout) in CONVNEXTS.items():
        make = partial(make, weights, config.drop_path)
        yield Candidate(name, partial(build, make, layout), gate=partial(gate, expected, None))
    if mvit := MVITS.get(config.model):
        make = partial(from_mvit, mvit, size, config.drop_path)
        yield Candidate(f"timm {mvit}", partial(build, make), gate=partial(gate, None, None))


def pretraining(config: CompareConfig, size: tuple[int, int], device: torch.device) -> Iterator[Candidate]:
    """Masked autoencoders, each with its paper's mask ratio, its own encoder and its own decoder: ours, and a ViT's."""
    parts = count(config.model, image_size=size, mask_ratio=MASKED)
    macs = parts["encoder"].sparse + parts["decoder"].sparse
    ramp = torch.linspace(0, 200, size[1])[:, None].expand(*size, 3)  # what can be learnt in a few steps
    pixels = (ramp + torch.randint(56, (config.batch_size, *size, 3))).to(device, torch.uint8)
    build = partial(training, config, (pixels,))
    ours = partial(build, partial(FCMAE, config.model, image_size=size, mask_ratio=MASKED))
    yield Candidate(f"{OURS}, {100 * MASKED:.0f} % masked", ours, gate=partial(gate, None, macs))
    vit = VITS.get(config.model, VITS["base"])
    name = vit[0] if config.model in VITS else f"{vit[0]} (the smallest)"
    theirs = partial(build, partial(vit_mae, size, *vit[1:]))
    yield Candidate(f"transformers MAE {name}, {100 * MAE_MASKED:.0f} % masked", theirs, gate=partial(gate, None, None))


TASKS = {"finetune": finetuning, "pretrain": pretraining}
BETAS = {"finetune": (0.9, 0.999), "pretrain": (0.9, 0.95)}


def from_timm(weights: Weights, drop_path: float) -> nn.Module:
    """timm's ConvNeXt V2 with our weights."""
    name = f"convnextv2_{weights.architecture['name']}"
    model = entry("timm", "create_model")(name, num_classes=CLASSES, drop_path_rate=drop_path)
    model.load_state_dict(TARGETS["timm"].from_official(weights.state))
    return model


def from_transformers(weights: Weights, drop_path: float) -> nn.Module:
    """transformers' ConvNeXt V2 with our weights."""
    library = TARGETS["huggingface"]
    options = library.configs[CONFIG](weights) | {"drop_path_rate": drop_path}
    config = entry("transformers", "ConvNextV2Config")(**options)
    model = entry("transformers", "ConvNextV2ForImageClassification")(config)
    model.load_state_dict(library.from_official(weights.state))
    return model


CONVNEXTS = {  # name: what makes the model, its layout in memory
    "timm": (from_timm, torch.contiguous_format),
    "timm, channels last": (from_timm, torch.channels_last),
    "transformers": (from_transformers, torch.contiguous_format),
}


def from_mvit(name: str, size: tuple[int, int], drop_path: float) -> nn.Module:
    """timm's MViTv2 with new weights."""
    create = entry("timm", "create_model")
    if size[0] != size[1]:
        raise UserError("it takes square images only")
    return create(name, num_classes=CLASSES, img_size=size, drop_path_rate=drop_path)


def vit_mae(size: tuple[int, int], width: int, layers: int, heads: int, patch: int) -> nn.Module:
    """Hugging Face's masked autoencoder with new weights."""
    configure, model = entry("transformers", "ViTMAEConfig"), entry("transformers", "ViTMAEForPreTraining")
    if size[0] != size[1] or size[0] % patch:
        raise UserError(f"it takes square images only, of a multiple of {patch} pixels")
    config = configure(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=size[0],
        patch_size=patch,
        mask_ratio=MAE_MASKED,
        norm_pix_loss=True,
    )
    return model(config)


class Objective(nn.Module):
    """A classifier's loss on images and labels, or on pixels that of a masked autoencoder, which draws its masks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return self.model(ImageFormat.imagenet().normalise(images)).loss
        return F.cross_entropy(logits(self.model, images).float(), labels)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """A classifier's logits, be they all that it returns or part of it."""
    result = model(images)
    return result if isinstance(result, Tensor) else result.logits


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """A classifier's logits in evaluation mode, in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return logits(model.eval(), images)


def training(
    config: CompareConfig,
    batch: tuple[Tensor, ...],
    make: Callable[[], nn.Module],
    layout: torch.memory_format = torch.contiguous_format,
) -> Training:
    """Training of a new model, always on the same batch. layout: of model and images in memory."""
    images, *labels = batch
    given = images.to(memory_format=layout), *labels
    objective = Objective(make().to(device=images.device, memory_format=layout))
    return Training(objective, lambda: given, BETAS[config.task], LR, config.dtype == "bf16")


def gate(expected: Tensor | None, macs: float | None, run: Training, passed: Mapping[Any, Run]) -> Row:
    """The gate of a model that has to give the expected logits, or of one whose loss has to fall where there are none.

    macs: multiply-accumulates of an image's forward pass, None to count them.
    """
    if macs is None:  # by shapes alone, as the CPU's fused attention goes uncounted
        with torch.device("meta"):
            macs = module_macs(copy.deepcopy(run.objective).to("meta"), *(t[:1].to("meta") for t in run.inputs()))
    row = {"gmacs": macs / 1e9, "error": None}
    if expected is None:
        return row | falling_loss(run)
    error = relative(logits_of(run.objective.model, run.inputs()[0][:GATE_BATCH]), expected)
    return row | {"error": error} | LOGITS(error)
