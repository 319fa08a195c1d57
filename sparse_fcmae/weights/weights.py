"""ConvNeXt V2's weights under the official names, which are those of this package's own modules.

A state under the official names has four parts: the encoder (`downsample_layers`, `stages`), the `norm` and the `head`
of a classifier, and the decoder of pretraining (`proj`, `mask_token`, `decoder`, `pred`).
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sparse_fcmae.data.decoders.image import reading_of
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.transform import Transform
from sparse_fcmae.data.views import CentreView, default_crop_fraction
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.runtime.errors import UserError

DECODER = re.compile(r"(proj|mask_token|decoder|pred)\b")  # how the names of the decoder begin
OBJECTIVE = ("mask_ratio", "mask_patch_size", "mask_grid", "norm_pix_loss", "sparse")  # of an FCMAE, in a run's config


@dataclass(frozen=True)
class Weights:
    """ConvNeXt V2's weights, float32, under the official names.

    state: the encoder's tensors and, where there are any, those of `norm`, `head` and decoder.
    architecture: the arguments of `SparseEncoder`, without the backend.
    classes: the names of the head's outputs, where they are known.
    known_form: the images that they take, where it is known.
    layout: the name of the adapter that recognised them.
    sparse: whether they are those of a pretraining model, which runs on masked images.
    original: the tensors as they were read, under the names that the layout has for them.
    config: what the library that they are from configures them by, where it lay beside them.
    notes: what was left out when they were read, and why, a line each.
    origin: how they came about, in sentences, where that is known.
    task: what the head's outputs are: "classification", "multilabel" or "regression".
    """

    state: dict[str, Tensor]
    architecture: dict[str, Any]
    classes: tuple[str, ...] | None = None
    known_form: ImageFormat | None = None
    layout: str = "official"
    sparse: bool = False
    original: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    task: str = "classification"

    @classmethod
    def of(
        cls,
        model: SparseEncoder,
        classes: tuple[str, ...] | None = None,
        form: ImageFormat | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> "Weights":
        """The weights of an encoder or a classifier, or others in their place, and the images that it takes."""
        state = state or {key: value.detach().cpu() for key, value in model.state_dict().items()}
        return cls(state, architecture_of(model), classes, form)

    @property
    def num_classes(self) -> int:
        """The number of the head's outputs, 0 where there is no head."""
        return len(self.state["head.weight"]) if "head.weight" in self.state else 0

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder of pretraining is among them."""
        return "mask_token" in self.state

    @property
    def form(self) -> ImageFormat:
        """The images that they take: what is known, or else 8 bits with ImageNet's statistics."""
        return self.known_form or ImageFormat.imagenet(self.architecture["in_chans"])

    def per_image(self) -> "Weights":
        """The same weights with the response norm over each image, as everywhere but in pretraining."""
        return replace(self, architecture=self.architecture | {"grn_scope": "image"})

    def without(self, *parts: str) -> dict[str, Tensor]:
        """The state without some of its parts, which are named "norm", "head" and "decoder"."""
        return {key: value for key, value in self.state.items() if part_of(key) not in parts}

    def encoder(self, backend: str = "auto") -> SparseEncoder:
        """The encoder, in evaluation mode."""
        encoder = SparseEncoder(**self.architecture, backend=backend)
        encoder.load_state_dict(self.without("norm", "head", "decoder"))
        encoder.transform = self.transform()
        return encoder.eval()

    def classifier(self, backend: str = "auto", drop_path: float = 0.0) -> Classifier:
        """The classifier, in evaluation mode. Raises UserError where there is no head."""
        if not self.num_classes:
            raise UserError("these weights have no classification head: fine-tune them to get one")
        model = Classifier(**self.architecture, num_classes=self.num_classes, backend=backend, drop_path=drop_path)
        model.load_state_dict(self.without("decoder"))
        model.classes, model.transform = self.classes, self.transform()
        return model.eval()

    def fcmae(self, backend: str = "auto") -> FCMAE:
        """The model of pretraining, in evaluation mode. What no config says is as `FCMAE` has it.

        Raises UserError where there is no decoder.
        """
        if not self.has_decoder:
            raise UserError("these weights have no decoder: name a run of `pretrain`, or one of its checkpoints")
        said = {name: self.config[name] for name in OBJECTIVE if name in (self.config or {})}
        depth = len({key.split(".")[1] for key in self.state if key.startswith("decoder.")})
        size = {"decoder_dim": self.state["mask_token"].numel(), "decoder_depth": depth}
        model = FCMAE(**self.architecture, **said, **size, backend=backend)
        own = self.without("norm", "head")
        model.load_state_dict({key if DECODER.match(key) else f"encoder.{key}": own[key] for key in own})
        model.encoder.transform = self.transform()
        return model.eval()

    def transform(self, crop_fraction: float | None = None) -> Transform:
        """What makes of an image what a model with these weights takes.

        crop_fraction: as in `CentreView`; None for what suits the size or, where the model was trained on native
        windows, for the window in the middle.
        """
        size, native = self.architecture["image_size"], self.form.native and crop_fraction is None
        fraction = crop_fraction or default_crop_fraction(size)
        return Transform(CentreView(size, reading_of(self.form), fraction, native), self.form)


def architecture_of(encoder: SparseEncoder) -> dict[str, Any]:
    """The arguments that make an encoder of the same shape, without the backend."""
    names = ("name", "image_size", "in_chans", "stem_stride", "grn_scope", "grn", "layer_scale")
    return {name: getattr(encoder, name) for name in names}


def patch_size_of(architecture: dict[str, Any]) -> int:
    """Pixels along a side of the patches of an encoder with these arguments."""
    return SIDES[0] * architecture["stem_stride"]


def part_of(key: str) -> str:
    """The part that an official name belongs to: "encoder", "norm", "head" or "decoder"."""
    if DECODER.match(key):
        return "decoder"
    return key.split(".")[0] if key.startswith(("norm.", "head.")) else "encoder"
