"""PyTorch's own graphs: a program of `torch.export`, and a package that AOTInductor has compiled from it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line
from sparse_fcmae.weights.graph import Graph, GraphTarget
from sparse_fcmae.weights.weights import Weights


class TorchExport(GraphTarget):
    """A program that `torch.export.load` reads, without this package."""

    name = "torch-export"
    weights_file = "model.pt2"
    suffixes = (".pt2",)
    library = "torch.export"
    least = 2  # as the program guards against maps of one position, whose memory may be read in either order

    def usage(self, weights: Weights) -> str:
        return 'import torch\n\nmodel = torch.export.load("FOLDER/model.pt2").module()'

    def export(self, graph: Graph, images: Tensor, shapes: dict[str, Any], names: tuple[str, ...], file: Path) -> None:
        torch.export.save(torch.export.export(graph, (images,), dynamic_shapes=shapes), file)

    def outputs_of(self, file: Path, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
        return list(torch.export.load(file).module()(images))


class AOTInductor(GraphTarget):
    """Machine code for the device and the instructions of this machine, which `aoti_load_package` loads."""

    name = "aotinductor"
    weights_file = "model.pt2"
    suffixes = (".pt2",)
    library = "AOTInductor"

    def usage(self, weights: Weights) -> str:
        return 'import torch\n\nmodel = torch._inductor.aoti_load_package("FOLDER/model.pt2")'

    def export(self, graph: Graph, images: Tensor, shapes: dict[str, Any], names: tuple[str, ...], file: Path) -> None:
        program = torch.export.export(graph, (images,), dynamic_shapes=shapes)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        except Exception as error:  # no compiler, or one that fails
            reason = one_line(error)[:300]
            raise UserError(f"`to=aotinductor` can't compile the model, which needs a C++ compiler: {reason}") from None

    def outputs_of(self, file: Path, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
        return list(torch._inductor.aoti_load_package(str(file))(images))
