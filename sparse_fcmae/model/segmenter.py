"""Semantic segmentation: UperNet on the maps of the encoder's four stages, by the library transformers.

UperNet: Xiao et al., 2018, with the auxiliary head that mmsegmentation gives it. As in ConvNeXt's code for
segmentation, each map goes through a LayerNorm first.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.model.classifier import set_drop_path
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

AUXILIARY_CHANNELS = 256
AUXILIARY_STAGE = 2  # counted from 0


class Segmenter(nn.Module):
    """The class of each pixel of images.

    num_classes: outputs. head_channels: width of UperNet. drop_path: as in `Classifier`. The other arguments are
    `SparseEncoder`'s. Raises UserError where transformers can't be imported, and for wrong values.
    """

    def __init__(
        self,
        name: str,
        *,
        num_classes: int,
        head_channels: int = 512,
        drop_path: float = 0.0,
        **encoder_options,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"{num_classes} classes: segmentation needs 2 at least")
        if head_channels < 1:
            raise UserError(f"`head_channels` {head_channels} must be at least 1")
        self.backbone = SparseEncoder(name, **encoder_options)
        set_drop_path(self.backbone, drop_path)
        self.num_classes, self.head_channels = num_classes, head_channels
        channels = list(self.backbone.channels)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=EPS) for width in channels)
        upernet = _upernet()
        options = SimpleNamespace(
            num_labels=num_classes,
            hidden_size=head_channels,
            pool_scales=(1, 2, 3, 6),
            auxiliary_in_channels=None,
            auxiliary_channels=min(AUXILIARY_CHANNELS, head_channels),
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.decode_head = upernet.UperNetHead(options, channels)
        self.auxiliary_head = upernet.UperNetFCNHead(options, channels, in_index=AUXILIARY_STAGE)
        self.classes: tuple[str, ...] | None = None  # the names of the outputs, where they are known

    def train(self, mode: bool = True) -> "Segmenter":
        """Sets the mode. A backbone of which nothing is trained stays as in evaluation: it then drops no paths."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W], floating and normalised, of any size -> logits [B, num_classes, H, W]."""
        return self._sized(self.decode_head(self._maps(images)), images)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the logits of the auxiliary head, of the same shape."""
        maps = self._maps(images)
        return self._sized(self.decode_head(maps), images), self._sized(self.auxiliary_head(maps), images)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The normalised maps of the four stages."""
        maps = self.backbone.features(images)
        return [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]

    def _sized(self, logits: Tensor, images: Tensor) -> Tensor:
        """Logits at the first stage's stride as those of the images' pixels."""
        return F.interpolate(logits.float(), images.shape[-2:], mode="bilinear", align_corners=False)


def _upernet():
    """The module of transformers with UperNet's heads."""
    try:
        from transformers.models.upernet import modeling_upernet
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise UserError(f"transformers can't be imported ({one_line(error)})") from None
        raise UserError("segmentation needs transformers: pip install transformers (the extra segmentation)") from None
    except Exception as error:  # such as torchvision beside another torch
        raise UserError(f"transformers can't be imported ({one_line(error)})") from None
    return modeling_upernet


@torch.no_grad()
def class_map(logits: Tensor, height: int, width: int, band: int = 256) -> Tensor:
    """The most probable class of each pixel of an image: logits [K, h, w] -> int16 [height, width].

    It is the greatest of the logits after bilinear interpolation, in bands of rows, so that those of a large image are
    never all there at once.
    """
    rows = logits.shape[1]
    wide = F.interpolate(logits[None], (rows, width), mode="bilinear", align_corners=False)[0]
    place = ((torch.arange(height, device=logits.device) + 0.5) * rows / height - 0.5).clamp(0, rows - 1)
    above = place.long()
    below, share = (above + 1).clamp(max=rows - 1), (place - above)[None, :, None]
    found = [
        torch.lerp(wide[:, above[at : at + band]], wide[:, below[at : at + band]], share[:, at : at + band]).argmax(0)
        for at in range(0, height, band)
    ]
    return torch.cat(found).to(torch.int16)
