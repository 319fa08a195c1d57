"""What `bench compare` compares: a training step of this package's models and of what other libraries have instead.

Every step is a `TrainStep` on the same images: forward and backward pass and AdamW, and for pretraining the masks too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.benchmarks.timing import relative
from sparse_fcmae.classifier import Classifier
from sparse_fcmae.config import CompareConfig
from sparse_fcmae.data import normalise
from sparse_fcmae.errors import UserError
from sparse_fcmae.fcmae import FCMAE
from sparse_fcmae.flops import count, module_macs
from sparse_fcmae.formats.layouts import LAYOUTS
from sparse_fcmae.formats.libraries import CONFIG, entry, huggingface_configs
from sparse_fcmae.formats.weights import Weights
from sparse_fcmae.training.optim import adamw, set_lr
from sparse_fcmae.training.step import TrainStep

OURS = "sparse-fcmae"
CLASSES = 1000
GATE_BATCH = 8  # images whose logits are compared
LR = 1e-4
MASKED, MAE_MASKED = 0.6, 0.75  # as their papers have it
MVITS = {"tiny": "mvitv2_tiny", "base": "mvitv2_base", "large": "mvitv2_large", "huge": "mvitv2_huge_cls"}  # by GMACs
VITS: dict[str, tuple[str, dict[str, int]]] = {  # of ViTMAEConfig
    "base": ("ViT-B/16", {}),
    "large": (
        "ViT-L/16",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "huge": (
        "ViT-H/14",
        {
            **{"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120},
            "patch_size": 14,
        },
    ),
}


@dataclass(frozen=True)
class Candidate:
    """step: one step of training, which returns its loss. macs: multiply-accumulates of an image's forward pass.
    error: of the logits of a model that has our weights, relative to those of dense convolution."""

    step: Callable[[], Tensor]
    macs: float
    error: float | None = None


Builds = dict[str, Callable[[], Candidate]]  # raise UserError for what can't be had here; ours comes first


def finetuning(config: CompareConfig, size: tuple[int, int], device: torch.device) -> Builds:
    """Dense training of a classifier: ConvNeXt V2 with the same weights, MViTv2 of like size with its own."""
    ours = Classifier(config.model, num_classes=CLASSES, image_size=size, drop_path=config.drop_path)
    with torch.no_grad():
        for parameter in ours.parameters():  # GRN and biases start at zero and would go unseen
            parameter.add_(0.02 * torch.randn_like(parameter))
    weights = Weights.of(copy.deepcopy(ours))  # which training leaves as they are
    images = torch.randn(config.batch_size, 3, *size, device=device)
    labels = torch.randint(CLASSES, (config.batch_size,), device=device)
    ours.to(device).backend = "masked"
    expected = logits_of(ours, images[:GATE_BATCH])
    ours.backend = "auto"
    macs = count(config.model, image_size=size, num_classes=CLASSES, mask_ratio=0)["classifier"].dense

    def step_of(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        def loss(images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits(model, images).float(), labels)

        return training_step(model, loss, config, (0.9, 0.999), images, labels)

    def build(make: Callable[[Weights, float], nn.Module], memory_format: torch.memory_format, same: bool) -> Candidate:
        model = make(weights, config.drop_path).to(device=device, memory_format=memory_format)
        given = images.to(memory_format=memory_format)
        error = relative(logits_of(model, given[:GATE_BATCH]), expected) if same else None
        return Candidate(step_of(model, given), macs_of(model, size), error)

    def build_ours() -> Candidate:
        return Candidate(step_of(ours, images), macs, relative(logits_of(ours, images[:GATE_BATCH]), expected))

    builds: Builds = {OURS: build_ours}
    builds |= {name: partial(build, *how, same=True) for name, how in CONVNEXTS.items()}
    if mvit := MVITS.get(config.model):
        builds[f"timm {mvit}"] = partial(build, partial(from_mvit, mvit), torch.contiguous_format, same=False)
    return builds


def pretraining(config: CompareConfig, size: tuple[int, int], device: torch.device) -> Builds:
    """Masked autoencoders, each with its paper's mask ratio, its own encoder and its own decoder: ours, and a ViT's."""
    parts = count(config.model, image_size=size, mask_ratio=MASKED)
    macs = parts["encoder"].sparse + parts["decoder"].dense
    ramp = torch.linspace(0, 200, size[1])[:, None].expand(*size, 3)  # what can be learnt in a few steps
    pixels = (ramp + torch.randint(56, (config.batch_size, *size, 3))).to(device, torch.uint8)

    def build(make: Callable[[], nn.Module], macs: float | None = None) -> Candidate:
        model = make().to(device)
        macs = macs or macs_of(model, size)
        step = training_step(model, lambda pixels: model(normalise(pixels)).loss, config, (0.9, 0.95), pixels)
        return Candidate(step, macs)

    vit, options = VITS.get(config.model, VITS["base"])
    none_smaller = "" if config.model in VITS else " (the smallest)"
    return {
        f"{OURS}, {100 * MASKED:.0f} % masked": partial(
            build, partial(FCMAE, config.model, image_size=size, mask_ratio=MASKED), macs
        ),
        f"transformers MAE {vit}{none_smaller}, {100 * MAE_MASKED:.0f} % masked": partial(
            build, partial(vit_mae, size, options)
        ),
    }


TASKS = {"finetune": finetuning, "pretrain": pretraining}


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


CONVNEXTS = {
    "timm": (from_timm, torch.contiguous_format),
    "timm, channels last": (from_timm, torch.channels_last),
    "transformers": (from_transformers, torch.contiguous_format),
}


def from_mvit(name: str, weights: Weights, drop_path: float) -> nn.Module:
    """timm's MViTv2 with new weights, for the images of ours."""
    create, size = entry("timm", "create_model"), tuple(weights.architecture["image_size"])
    if size[0] != size[1]:
        raise UserError("it takes square images only")
    return create(name, num_classes=CLASSES, img_size=size, drop_path_rate=drop_path)


def vit_mae(size: tuple[int, int], options: dict[str, int]) -> nn.Module:
    """Hugging Face's masked autoencoder with new weights; options are those of its configuration."""
    configure, model = entry("transformers", "ViTMAEConfig"), entry("transformers", "ViTMAEForPreTraining")
    config = configure(image_size=size[0], mask_ratio=MAE_MASKED, norm_pix_loss=True, **options)
    if size[0] != size[1] or size[0] % config.patch_size:
        raise UserError(f"it takes square images only, of a multiple of {config.patch_size} pixels")
    return model(config)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """A model's logits in evaluation mode, float32."""
    model.eval()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return logits(model, images)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    result = model(images)
    return result if isinstance(result, Tensor) else result.logits


def training_step(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    config: CompareConfig,
    betas: tuple[float, float],
    *batch: Tensor,
) -> Callable[[], Tensor]:
    """One step of training, always on the same batch."""
    optimizer = adamw(model, 0.05, betas)
    set_lr(optimizer, LR)
    work = TrainStep(loss_of, model, optimizer, share=config.batch_size, bf16=config.dtype == "bf16")

    def run() -> Tensor:
        model.train()
        work.add(*batch, last=True)
        return work.finish()

    return run


def macs_of(model: nn.Module, size: tuple[int, int]) -> float:
    """Multiply-accumulates of an image's forward pass; by shapes alone, as the CPU's fused attention goes uncounted."""
    with torch.device("meta"):
        return module_macs(copy.deepcopy(model).to("meta"), torch.empty(1, 3, *size))
