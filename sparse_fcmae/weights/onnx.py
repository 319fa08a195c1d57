"""ONNX: the dense encoder or classifier as a graph, which is written and run, but not read."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.weights.adapter import entry
from sparse_fcmae.weights.graph import Graph, GraphTarget
from sparse_fcmae.weights.weights import Weights

OPSET = 18
ONE_FILE = 1.8e9  # bytes of weights from which they lie beside the graph, as a protobuf ends at 2 GiB


class Onnx(GraphTarget):
    """A graph for onnxruntime and others."""

    name = "onnx"
    weights_file = "model.onnx"
    suffixes = (".onnx",)
    library = "onnxruntime"
    hub_library = "onnx"

    def files(self, file: Path) -> list[Path]:
        """The graph, and the weights where they are too large to lie in it."""
        return [file, file.with_name(file.name + ".data")]

    def save(self, weights: Weights, file: Path) -> str:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                importlib.import_module(package)
            except ImportError:
                message = f"`to=onnx` needs {package}: pip install onnx onnxscript onnxruntime, extra onnx"
                raise UserError(message) from None
        return super().save(weights, file)

    def usage(self, weights: Weights) -> str:
        return (
            "import onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
            f'outputs = session.run({list(self.outputs(weights))}, {{"images": images}})'
        )

    def export(self, graph: Graph, images: Tensor, shapes: dict[str, Any], names: tuple[str, ...], file: Path) -> None:
        size = sum(parameter.numel() * parameter.element_size() for parameter in graph.parameters())
        torch.onnx.export(
            graph,
            (images,),
            file,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(names),
            dynamic_shapes=shapes,
            external_data=size > ONE_FILE,
            verbose=False,
        )

    def outputs_of(self, file: Path, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
        session = entry("onnxruntime", "InferenceSession")(str(file), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(output) for output in session.run(list(names), {"images": images.numpy()})]
