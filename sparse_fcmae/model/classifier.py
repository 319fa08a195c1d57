"""Dense ConvNeXt V2 with a classification head, on the encoder's modules and kernels.

ConvNeXt V2 (Woo et al., 2023), section 4 and appendix A. The state dict has the official names.
"""

import torch
from torch import Tensor, nn

from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.model.convnext import SparseEncoder, init_weights
from sparse_fcmae.runtime.errors import UserError

HEAD_INIT = 0.001  # scale of a new head's weights, so that the first steps hardly move what was pretrained


class Classifier(SparseEncoder):
    """The encoder without a mask, mean over positions, LayerNorm, linear head.

    num_classes: outputs. drop_path: the probability with which an image skips the last block in training; it rises
    linearly from 0 in the first block. What is skipped is not computed. The other arguments are `SparseEncoder`'s.
    """

    def __init__(self, name: str, *, num_classes: int = 1000, drop_path: float = 0.0, **encoder_options) -> None:
        super().__init__(name, **encoder_options)
        if num_classes < 1:
            raise UserError(f"{num_classes} classes: there must be at least 1")
        self.num_classes = num_classes
        self.classes: tuple[str, ...] | None = None  # the names of the outputs, where they are known
        self.norm = nn.LayerNorm(self.num_features, eps=EPS)
        self.head = nn.Linear(self.num_features, num_classes)
        set_drop_path(self, drop_path)
        self.new_head()

    def new_head(self) -> None:
        """Gives the head new weights: `init_weights`, times HEAD_INIT."""
        init_weights(self.head)
        with torch.no_grad():
            self.head.weight *= HEAD_INIT

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> logits [B, num_classes]. Raises UserError for images of another shape."""
        features = super().forward(images)
        return self.head(self.norm(features.mean((2, 3))))


def set_drop_path(encoder: SparseEncoder, rate: float) -> None:
    """Has images skip blocks in training: the last one with this probability, and earlier ones less, the first never.

    Raises UserError for what is no probability below 1.
    """
    if not 0 <= rate < 1:
        raise UserError(f"`drop_path` {rate} must be 0 or more and less than 1")
    blocks = [block for stage in encoder.stages for block in stage]
    for i, block in enumerate(blocks):
        block.drop_path = rate * i / (len(blocks) - 1)


def create_classifier(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    drop_path: float = 0.0,
    backend: str = "auto",
    stem_stride: int = 4,
    grn_scope: str = "image",
    grn: bool = True,
    layer_scale: bool = False,
) -> Classifier:
    """A `Classifier` with new weights."""
    return Classifier(
        name,
        num_classes=num_classes,
        image_size=image_size,
        in_chans=in_chans,
        drop_path=drop_path,
        backend=backend,
        stem_stride=stem_stride,
        grn_scope=grn_scope,
        grn=grn,
        layer_scale=layer_scale,
    )
