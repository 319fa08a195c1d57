"""Segmentation models as files: the encoder under the official names behind `backbone.`, and transformers' heads."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.masks import MaskClasses
from sparse_fcmae.model.segmenter import Segmenter
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import new_folder, read_json, save_tensors, write_json, writing
from sparse_fcmae.weights.adapter import CARD, CONFIG
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.card import segmenter_card
from sparse_fcmae.weights.official import FORMAT
from sparse_fcmae.weights.opening import load, weights_file
from sparse_fcmae.weights.read import understand
from sparse_fcmae.weights.weights import Weights

HEAD = "decode_head.classifier.weight"
FILE = TARGETS["official"].weights_file


@dataclass(frozen=True)
class SegmenterWeights:
    """What `export_segmenter` wrote: all tensors, the encoder among them by itself, and the classes."""

    state: dict[str, Tensor]
    encoder: Weights
    classes: MaskClasses

    @property
    def head_channels(self) -> int:
        """The width of UperNet."""
        return self.state[HEAD].shape[1]

    def model(self, backend: str = "auto") -> Segmenter:
        """The model, in evaluation mode."""
        shape = self.encoder.architecture | {"grn_scope": "image"}
        model = Segmenter(**shape, num_classes=len(self.classes), head_channels=self.head_channels, backend=backend)
        model.load_state_dict(self.state)
        model.classes = self.classes.names
        model.backbone.transform = self.encoder.transform()
        return model.eval()


def holds_segmenter(path: str | Path) -> bool:
    """Whether weights are those of a segmentation model of this package. Raises UserError for what can't be read."""
    return "mask_values" in _config_of(weights_file(Path(path)))


def _config_of(file: Path) -> dict[str, Any]:
    """The config beside a file of weights or, for a checkpoint, in the folder of its run; empty where there is none."""
    places = [file.parent, *([file.parents[2]] if file.parent.parent.name == "checkpoints" else [])]
    config = next((place / CONFIG for place in places if (place / CONFIG).is_file()), None)
    found = read_json(config) if config else {}
    return found if isinstance(found, dict) else {}


def load_segmenter(path: str | Path, *, backend: str = "auto") -> Segmenter:
    """A segmentation model with the weights that `finetune --task segmentation` exported, in evaluation mode.

    Raises UserError for weights of another kind.
    """
    return read_segmenter(path).model(backend)


def read_segmenter(path: str | Path) -> SegmenterWeights:
    """The weights of a segmentation model. Raises UserError for those of another kind, and for damaged ones."""
    if not holds_segmenter(path):
        raise UserError(f"{path} is no segmentation model: fine-tune one by `task=segmentation`")
    file = weights_file(Path(path))
    state, _ = load(file)
    if HEAD not in state:
        raise UserError(f"{file} has no {HEAD}: export the model again")
    config = _config_of(file)
    try:
        values = tuple(int(value) for value in config["mask_values"])
        names = tuple(map(str, config["classes"]))
        ignored = tuple(int(value) for value in config["ignored"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{CONFIG} of {file} can't be understood ({type(error).__name__}: {error})") from None
    if not len(values) == len(names) == len(state[HEAD]):
        raise UserError(f"{CONFIG} of {file} names {len(names)} classes, the model has {len(state[HEAD])}")
    return SegmenterWeights(state, understand(state, file), MaskClasses(values, names, ignored))


def export_segmenter(
    model: Segmenter,
    folder: Path,
    classes: MaskClasses,
    form: ImageFormat,
    state: dict[str, Tensor] | None = None,
    origin: tuple[str, ...] = (),
) -> None:
    """Writes a segmentation model, with the config that `load_segmenter` reads, and checks what comes back.

    state, origin: as in `export_model`.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in (state or model.state_dict()).items()}
    encoder = replace(Weights.of(model.backbone, form=form), origin=origin)
    config = {"format": f"{FORMAT} segmenter"} | encoder.architecture | form.as_json()
    config |= {"classes": classes.names, "mask_values": classes.values, "ignored": classes.ignored, "origin": origin}
    with new_folder(folder) as temporary:
        with writing(folder):
            save_tensors(state, temporary / FILE)
            write_json(temporary / CONFIG, config)
            (temporary / CARD).write_text(
                segmenter_card(encoder, classes.names, sum(value.numel() for value in state.values()))
            )
        again = read_segmenter(temporary)
        if any(not torch.equal(value, again.state[name]) for name, value in state.items()):
            raise UserError(f"{folder}: what was written is not what was trained: is the disk full or damaged?")
