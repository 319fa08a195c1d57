"""What this package needs to know of a library to write its weights, to read them and to run them.

A `Target` is a form in which weights can be written. An `Adapter` is a target that can be read as well: a library's
layout of the same tensors. Each has a file of its own here, and `adapters.py` lists them all.
"""

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat, of_units
from sparse_fcmae.kernels.constants import EPS
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, save_pickled, save_tensors, write_json
from sparse_fcmae.runtime.options import image_size_of
from sparse_fcmae.weights.weights import DECODER, Weights

CONFIG = "config.json"
CARD = "README.md"  # for people
LARGEST = 1 << 20  # pixels along a side of an image
TASKS = {  # by what transformers calls them in `problem_type`
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}
PROBLEM_TYPES = {task: name for name, task in TASKS.items()}
Names = tuple[tuple[str, str], ...]  # regular expressions, each with its replacement, applied one after the other
Outputs = dict[str, Tensor]  # of a model: "features" [B, D, H/P, W/P], "stage1" to "stage4", "logits" or "pooled"
TOLERANCE = 1e-5  # relative Frobenius error in float32


@dataclass(frozen=True)
class Settings:
    """What the config of a model says and the shapes of its weights do not. Each default stands for "not said"."""

    image_size: tuple[int, int] = (224, 224)
    classes: tuple[str, ...] | None = None
    form: ImageFormat | None = None
    grn_scope: str = "image"
    origin: tuple[str, ...] = ()
    task: str = "classification"

    @classmethod
    def of(
        cls,
        image_size: Any,
        classes: Any,
        images: dict[str, Any],
        grn_scope: str = "image",
        origin: Any = (),
        problem: str | None = None,
    ) -> "Settings":
        """The settings in values of a JSON file, None for what it does not say.

        images: a format as `ImageFormat.as_json` gives it, or "mean" and "std" alone, of 8-bit values between 0 and 1.
        problem: as transformers calls the task. Raises KeyError, TypeError or ValueError for values of another kind.
        """
        size, form = image_size_of(image_size) if image_size else cls.image_size, None
        if not 1 <= min(size) <= max(size) <= LARGEST:
            raise ValueError(f"no image has {size[0]}x{size[1]} pixels")
        if images.get("mean") and images.get("std"):
            form = ImageFormat.of_json(images) if "dtype" in images else of_units(images["mean"], images["std"])
        if problem is not None and problem not in TASKS:
            raise ValueError(f"problem_type {problem!r} is unknown")
        task = TASKS[problem] if problem else cls.task
        return cls(size, tuple(map(str, classes)) if classes else None, form, grn_scope, tuple(map(str, origin)), task)


class Target(ABC):
    """A form in which weights can be written: as a folder with configs, or as a file of the weights alone.

    name: what the option `to` calls it.
    weights_file: the name of the file with the weights in a folder.
    suffixes: how the name of a file may end that is written without a folder.
    configs: the names of the other files in a folder, each with the function that makes its content of the weights.
        The content is the text of the file, or a value that is written as JSON.
    drops: the parts of the weights that it has no place for.
    ends_in_norm: whether an encoder without a head has a final norm there.
    keeps_grn_scope: whether its configs say what the response norm pools over.
    keeps_task: whether its configs say what the outputs of a head are.
    keeps_blocks: whether it has a place for blocks other than ConvNeXt V2's.
    library: the Python module that runs what is written, None where none is known to.
    hub_library: what model hubs call the library that loads a folder, None where they don't know it.
    tolerance: the greatest relative error of what that computes.
    """

    name: str
    weights_file: str
    suffixes: tuple[str, ...]
    configs: ClassVar[dict[str, Callable[[Weights], Any]]] = {}
    drops: tuple[str, ...] = ("decoder",)
    ends_in_norm = False
    keeps_grn_scope = False
    keeps_task = False
    keeps_blocks = False
    library: str | None = None
    hub_library: str | None = None
    tolerance = TOLERANCE

    def refusal(self, architecture: dict[str, Any], single: bool = False) -> str | None:
        """Why a folder of this kind or, where `single`, a file can't hold a model, and what to do instead.

        None where it can.
        """
        if self.keeps_blocks or (architecture["grn"] and not architecture["layer_scale"]):
            return None
        return f"{self.name} has no blocks without GRN or with layer scale: give `to=official`"

    def losses(self, weights: Weights, single: bool) -> list[str]:
        """What is not kept in a folder or, where `single`, in a file of the weights alone, a line each."""
        lines = []
        if weights.architecture["grn_scope"] == "batch" and (single or not self.keeps_grn_scope):
            lines.append("the response norm pools over each image there, not over the batch as in pretraining")
        if weights.task != "classification" and (single or not self.keeps_task):
            what = "several labels" if weights.task == "multilabel" else "a number"
            lines.append(f"that the outputs are those of {what}, and not of one class, is not said there")
        return lines

    @abstractmethod
    def save(self, weights: Weights, file: Path) -> str:
        """Writes the weights, which have none of the dropped parts, into a file; returns what was done."""

    def write_configs(self, weights: Weights, folder: Path) -> None:
        """Writes the configs into a folder."""
        for name, make in self.configs.items():
            content = make(weights)
            if isinstance(content, str):
                (folder / name).write_text(content)
            else:
                write_json(folder / name, content)

    @abstractmethod
    def usage(self, weights: Weights) -> str:
        """Python code that loads a folder of this kind, which it calls FOLDER."""

    def files(self, file: Path) -> list[Path]:
        """The files that `save` may make when it is to write `file`."""
        return [file]

    def folder_files(self) -> list[str]:
        """The names of all files that a folder may hold."""
        return [file.name for file in self.files(Path(self.weights_file))] + [*self.configs, CARD]

    def outputs(self, weights: Weights) -> tuple[str, ...]:
        """The names of the outputs that a model has before and after its weights are written here."""
        if "norm" in self.drops:
            return ("features",)
        return ("features", "logits" if weights.num_classes else "pooled")

    def run(self, path: Path, weights: Weights, images: Tensor) -> Outputs:
        """What the library itself computes of images with the folder or file that `weights` were written to.

        Only a target that names its `library` is run. Raises UserError where the library can't be imported, and
        whatever the library raises.
        """
        raise NotImplementedError(f"no library is known to run {self.name}")


class Adapter(Target):
    """A library's layout of the weights, by which they are written and read.

    names: the replacements that turn an official name into this layout's, without the prefix.
    prefix: what stands before all its names but those of the head.
    variants: the replacements that turn another spelling of its names, which is in use too, into the usual one.
    telltale: an expression that is found in one of its names, and in no name of the adapters listed after it.
    wrapper: the key under which a .pt or .pth file holds the tensors, None where it holds them directly.
    sparse: whether it is the layout of a pretraining model, which runs on masked images.
    """

    weights_file = "model.safetensors"
    suffixes = (".safetensors", ".pt", ".pth")
    names: Names = ()
    prefix = ""
    variants: Names = ()
    telltale: re.Pattern[str]
    wrapper: str | None = None
    sparse = False

    def pack(self, key: str, value: Tensor, width: int) -> Tensor:
        """A tensor as this layout has it, of an official one with its official name. width: the stem's channels."""
        return value

    def unpack(self, key: str, value: Tensor, shape: torch.Size) -> Tensor:
        """The reverse of `pack`: a tensor of the official shape."""
        return value.reshape(shape)

    def read_config(self, config: dict[str, Any], folder: Path) -> Settings | None:
        """The settings in the content of the `CONFIG` of a folder, None where it is not this library's.

        Raises AttributeError, KeyError, TypeError or ValueError where it is, and holds something unexpected.
        """
        return None

    def unlike(self, config: dict[str, Any]) -> str | None:
        """The first setting in a config of this library that makes its model another function than this package's.

        Its name, its value and what can be read; None where there is none.
        """
        return None

    def shapes_in(self, config: dict[str, Any]) -> dict[str, Any]:
        """The numbers in a config of this library that shapes of tensors show too, by the names that it has there."""
        return {}

    def is_extra(self, name: str, names: Collection[str]) -> bool:
        """Whether the library adds a tensor of this name to an encoder, among these names, that is no part of it."""
        return False

    def is_stem(self, name: str) -> bool:
        """Whether a name, in any of the variants, is that of the first convolution's weight."""
        return self.usual(name) == self.rename("downsample_layers.0.0.weight")

    def norm_eps(self, config: dict[str, Any]) -> float:
        """What the final norm of a model with this config adds to the variance."""
        return EPS

    def rename(self, key: str) -> str:
        """An official name in this layout. The names of the decoder are the same in all that have one."""
        if DECODER.match(key):
            return key
        renamed = substitute(key, self.names)
        return renamed if key.startswith("head.") else self.prefix + renamed

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state under the official names in this layout."""
        width = len(state["downsample_layers.0.0.weight"])
        return {self.rename(key): self.pack(key, value, width).contiguous() for key, value in state.items()}

    def recognises(self, names: Collection[str]) -> bool:
        """Whether tensors of these names, in any of the variants, are in this layout."""
        return any(self.telltale.search(name) for name in names)

    def usual(self, name: str) -> str:
        """The name that `rename` gives, of a name in any of the variants."""
        return substitute(name, self.variants)

    def losses(self, weights: Weights, single: bool) -> list[str]:
        lines = super().losses(weights, single)
        if single:
            lines.append("image size, class names and normalisation are not in such a file: a folder has them")
        return lines

    def save(self, weights: Weights, file: Path) -> str:
        tensors = self.from_official(weights.state)
        self.save_tensors(tensors, file)
        return f"mapped {len(tensors)} tensors to the names of {self.name}"

    def save_tensors(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Writes tensors that are in this layout already. The format of the file follows from its name."""
        if file.suffix == ".safetensors":
            save_tensors(tensors, file)
        else:
            save_pickled({self.wrapper: tensors} if self.wrapper else tensors, file)


def first_unlike(settings: dict[str, Any], known: dict[str, tuple[Any, ...]]) -> str | None:
    """The first of the settings that is not known, or has none of the values that are, for `Adapter.unlike`."""
    for name, value in settings.items():
        if name not in known:
            return f"{name} {value!r}, which is not known here"
        if known[name] and value not in known[name]:
            return f"{name} {value!r}, not {' or '.join(map(repr, known[name]))}"
    return None


def substitute(name: str, names: Names) -> str:
    """A name after all replacements."""
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def flat_grn(key: str, value: Tensor) -> Tensor:
    """The parameters of the response norm as vectors, and any other tensor as it is."""
    return value.flatten() if ".grn." in key else value


def entry(module: str, name: str) -> Any:
    """What a library offers under a name. Raises UserError with the reason where it can't be imported."""
    try:
        return getattr(importlib.import_module(module), name)  # some libraries import themselves at that point only
    except Exception as error:  # not installed, or, like torchvision beside another torch, unusable
        package = module.split(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise UserError(f"{package} is not installed: pip install {package}") from None
        raise UserError(f"{module} can't be imported ({one_line(error)})") from None
