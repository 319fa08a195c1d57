"""Names and shapes of ConvNeXt V2's weights in every layout. The official dense one is this package's own.

A state under the official names has four parts: the encoder (`downsample_layers`, `stages`), the `norm` and `head` of a
classifier, and the decoder of pretraining (`proj`, `mask_token`, `decoder`, `pred`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CONV_MLP = (40, 48, 64, 80)  # widths of atto to nano, whose pointwise layers are 1x1 convolutions in timm
DECODER = re.compile(r"(proj|mask_token|decoder|pred)\b")
PREFIXES = re.compile(r"^((module|_orig_mod|model)\.)+")  # of DistributedDataParallel, torch.compile, trainers

TIMM = [
    (r"^downsample_layers\.0\.(\d)", r"stem.\1"),
    (r"^downsample_layers\.(\d)\.(\d)", r"stages.\1.downsample.\2"),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
]
HUGGINGFACE = [
    (r"^downsample_layers\.0\.0", "embeddings.patch_embeddings"),
    (r"^downsample_layers\.0\.1", "embeddings.layernorm"),
    (r"^downsample_layers\.(\d)\.(\d)", r"encoder.stages.\1.downsampling_layer.\2"),
    (r"^stages\.(\d)\.(\d+)\.norm\.", r"encoder.stages.\1.layers.\2.layernorm."),
    (r"^stages\.(\d)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"\.grn\.gamma$", ".grn.weight"),
    (r"\.grn\.beta$", ".grn.bias"),
    (r"^norm\.", "layernorm."),
    (r"^head\.", "classifier."),
]
MMPRETRAIN = [
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"^norm\.", "norm3."),
    (r"^head\.", "head.fc."),
]
MINKOWSKI = [  # the pretraining model of the official code; its stem is dense
    (r"^(downsample_layers\.[123]\.1)\.weight$", r"\1.kernel"),
    (r"^(downsample_layers\.[123]\.0)\.", r"\1.ln."),
    (r"\.dwconv\.weight$", ".dwconv.kernel"),
    (r"^(stages\.\d\.\d+\.norm)\.", r"\1.ln."),
    (r"\.(pwconv\d)\.", r".\1.linear."),
]
KERNEL = re.compile(r"^(stages\.\d\.\d+\.dwconv|downsample_layers\.[123]\.1)\.weight$")
KERNEL_BIAS = re.compile(r"^(stages\.\d\.\d+\.dwconv|downsample_layers\.[123]\.1)\.bias$")


def _as_it_is(key: str, value: Tensor, width: int) -> Tensor:
    return value


def _flat_grn(key: str, value: Tensor, width: int) -> Tensor:
    return value.flatten() if ".grn." in key else value


def _timm(key: str, value: Tensor, width: int) -> Tensor:
    if width in CONV_MLP and re.search(r"pwconv\d\.weight$", key):
        return value[:, :, None, None]
    return _flat_grn(key, value, width)


def _minkowski(key: str, value: Tensor, width: int) -> Tensor:
    """Convolutions as [k * k, in, out], depthwise ones as [k * k, C]; the tap at (row, column) is column * k + row."""
    if KERNEL.match(key):
        kernel = value.transpose(2, 3).flatten(2).permute(2, 1, 0)
        return kernel[:, 0] if ".dwconv." in key else kernel
    return value.reshape(1, -1) if re.match(r"stages.*\.grn\.", key) or KERNEL_BIAS.match(key) else value


def _reshaped(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    return value.reshape(shape)


def _from_minkowski(key: str, value: Tensor, shape: torch.Size) -> Tensor:
    if not KERNEL.match(key):
        return value.reshape(shape)
    kernel = value[:, None] if ".dwconv." in key else value
    return kernel.permute(2, 1, 0).unflatten(2, shape[2:]).transpose(2, 3)


@dataclass(frozen=True)
class Layout:
    """A layout of the weights.

    names: patterns and replacements that make its names of the official ones. prefix: of all names but the head's.
    pack: makes a tensor of this layout of an official one, given its official name and the model's width. unpack: makes
    an official one of a shape, given its official name.
    """

    names: list[tuple[str, str]]
    prefix: str = ""
    pack: Callable[[str, Tensor, int], Tensor] = _as_it_is
    unpack: Callable[[str, Tensor, torch.Size], Tensor] = _reshaped

    def rename(self, key: str) -> str:
        """An official name in this layout. The decoder's names are the same in all that know it."""
        if DECODER.match(key):
            return key
        renamed = key
        for pattern, replacement in self.names:
            renamed = re.sub(pattern, replacement, renamed)
        return renamed if key.startswith("head.") else self.prefix + renamed

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official state in this layout."""
        width = len(state["downsample_layers.0.0.weight"])
        return {self.rename(key): self.pack(key, value, width).contiguous() for key, value in state.items()}


LAYOUTS = {
    "official": Layout([]),
    "timm": Layout(TIMM, pack=_timm),
    "huggingface": Layout(HUGGINGFACE, prefix="convnextv2."),
    "mmpretrain": Layout(MMPRETRAIN, prefix="backbone.", pack=_flat_grn),
    "fcmae": Layout(MINKOWSKI, prefix="encoder.", pack=_minkowski, unpack=_from_minkowski),
}


def recognise(state: dict[str, Tensor]) -> tuple[str | None, dict[str, Tensor]]:
    """The layout of a state by its names, and the state with the prefixes that the layout has; None where none fits."""
    state = {PREFIXES.sub("", key): value for key, value in state.items()}
    if any(re.match(r"(convnextv2\.)?embeddings\.", key) for key in state):
        bare = re.compile(r"(embeddings|encoder|layernorm)\.")
        return "huggingface", {("convnextv2." if bare.match(k) else "") + k: v for k, v in state.items()}
    if "stem.0.weight" in state:
        return "timm", state
    if any(".depthwise_conv." in key for key in state):
        bare = re.compile(r"(downsample_layers|stages|norm3)\.")
        return "mmpretrain", {("backbone." if bare.match(k) else "") + k: v for k, v in state.items()}
    if any(key.endswith(".kernel") for key in state):
        bare = re.compile(r"(downsample_layers|stages)\.")
        return "fcmae", {("encoder." if bare.match(k) else "") + k: v for k, v in state.items()}
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    return ("official" if "downsample_layers.0.0.weight" in state else None), state
