"""The layout of the official pretraining model, whose sparse layers are MinkowskiEngine's.

The stem is dense. The names of MinkowskiEngine's norms and linear layers have `.ln.` and `.linear.` in them. Its
convolutions are named `.kernel`, are [k * k, in, out] or, depthwise, [k * k, C], and go through the k * k taps column
by column: the tap at (row, column) has the index column * k + row.
"""

import re
from typing import ClassVar

import torch
from torch import Tensor

from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.weights.adapter import CONFIG, Adapter
from sparse_fcmae.weights.official import model_config
from sparse_fcmae.weights.weights import Weights

CONVOLUTION = r"^(stages\.\d\.\d+\.dwconv|downsample_layers\.[123]\.1)"  # a layer's official name
KERNEL = re.compile(CONVOLUTION + r"\.weight$")
ROW = re.compile(CONVOLUTION + r"\.bias$|^stages.*\.grn\.")  # parameters that are [1, C]


class Fcmae(Adapter):
    """The official code's model for pretraining. It has the decoder, and neither final norm nor head."""

    name = "fcmae"
    names = (
        (r"^(downsample_layers\.[123]\.1)\.weight$", r"\1.kernel"),
        (r"^(downsample_layers\.[123]\.0)\.", r"\1.ln."),
        (r"\.dwconv\.weight$", ".dwconv.kernel"),
        (r"^(stages\.\d\.\d+\.norm)\.", r"\1.ln."),
        (r"\.(pwconv\d)\.", r".\1.linear."),
    )
    prefix = "encoder."
    variants = ((r"^(?=(downsample_layers|stages)\.)", "encoder."),)
    telltale = re.compile(r"\.kernel$")
    weights_file = "model.pt"
    wrapper = "model"
    configs: ClassVar = {CONFIG: model_config}
    drops = ("norm", "head")
    keeps_grn_scope = True
    sparse = True

    def usage(self, weights: Weights) -> str:
        return (
            "import torch\n"
            "from models.fcmae import fcmae  # of the official code\n\n"
            f"model = fcmae(depths={list(size_of(weights.architecture['name'])[0])}, "
            f"dims={list(size_of(weights.architecture['name'])[1])})\n"
            'model.load_state_dict(torch.load("FOLDER/model.pt")["model"], strict=False)'
        )

    def pack(self, key: str, value: Tensor, width: int) -> Tensor:
        if KERNEL.match(key):
            kernel = value.transpose(2, 3).flatten(2).permute(2, 1, 0)
            return kernel[:, 0] if ".dwconv." in key else kernel
        return value.reshape(1, -1) if ROW.match(key) else value

    def unpack(self, key: str, value: Tensor, shape: torch.Size) -> Tensor:
        if not KERNEL.match(key):
            return value.reshape(shape)
        kernel = value[:, None] if ".dwconv." in key else value
        return kernel.permute(2, 1, 0).unflatten(2, shape[2:]).transpose(2, 3)
