"""Models as graphs for other runtimes: what they compute, and for which images. Each runtime has a file of its own."""

import copy
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.weights.adapter import Outputs, Target
from sparse_fcmae.weights.weights import Weights, patch_size_of

STAGES = ("stage1", "stage2", "stage3", "stage4")


class Graph(nn.Module):
    """images [B, C, H, W] -> logits [B, classes] or, without a head, the last stage's map, and the maps of all."""

    def __init__(self, model: SparseEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        patches = self.model.patches(images)
        maps = [patches.scatter(x) for x in self.model.stage_outputs(images, patches)]
        if not hasattr(self.model, "head"):
            return (maps[-1].clone(), *maps)
        return (self.model.head(self.model.norm(maps[-1].mean((2, 3)))), *maps)


class GraphTarget(Target):
    """A graph from `images` to "logits" or, without a head, "features", and to the maps of the four stages.

    Any batch will do, and any height and width that are multiples of the patch. half: whether weights, images and
    outputs are float16; sums over positions and channels are float32 all the same. least: patches along a side.
    """

    keeps_blocks = True
    least = 1
    half = False

    def in_half(self) -> "GraphTarget":
        """The same in float16."""
        other = copy.copy(self)
        other.half = True
        return other

    @property
    def tolerance(self) -> float:
        """The greatest relative error of what a runtime computes."""
        return 5e-3 if self.half else 1e-5

    def outputs(self, weights: Weights) -> tuple[str, ...]:
        return ("logits" if weights.num_classes else "features", *STAGES)

    def save(self, weights: Weights, file: Path) -> str:
        # the masked backend is plain PyTorch where nothing is masked, which exporters understand
        weights = weights.per_image()
        model = weights.classifier("masked") if weights.num_classes else weights.encoder("masked")
        dtype = torch.float16 if self.half else torch.float32
        patch = patch_size_of(weights.architecture)
        images = torch.zeros(2, model.in_chans, 2 * patch, 3 * patch, dtype=dtype)
        batch = torch.export.Dim("batch", min=1, max=65536)
        rows, columns = (torch.export.Dim(name, min=self.least, max=4096) for name in ("rows", "columns"))
        shapes = {"images": {0: batch, 2: patch * rows, 3: patch * columns}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.export(Graph(model.to(dtype)), images, shapes, self.outputs(weights), file)
        what = "the classifier" if weights.num_classes else "the encoder"
        sides = f"{self.least * patch}, {(self.least + 1) * patch}, {(self.least + 2) * patch}, ..."
        return f"exported {what} in {str(dtype).removeprefix('torch.')}, for any batch and sides of {sides} pixels"

    @abstractmethod
    def export(self, graph: Graph, images: Tensor, shapes: dict[str, Any], names: tuple[str, ...], file: Path) -> None:
        """Writes the graph into a file. images: an example. shapes: its dynamic ones. names: of the outputs."""

    @abstractmethod
    def outputs_of(self, file: Path, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
        """What the runtime computes with a file."""

    def run(self, path: Path, weights: Weights, images: Tensor) -> Outputs:
        """The first image is run by itself and the others in a batch of all, so that a batch that is fixed shows."""
        file, names = path if path.is_file() else path / self.weights_file, self.outputs(weights)
        images = images.half() if self.half else images
        alone, together = (self.outputs_of(file, names, batch) for batch in (images[:1].clone(), images))
        return {
            name: torch.cat([first, rest[1:]]).float() for name, first, rest in zip(names, alone, together, strict=True)
        }
