"""ONNX: the dense encoder or classifier as a graph, which is written and run, but not read."""

import importlib
import warnings
from pathlib import Path

import torch
from torch import Tensor

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.weights.adapter import Outputs, Target, entry
from sparse_fcmae.weights.weights import Weights

OPSET = 18
ONE_FILE = 1.8e9  # bytes of weights from which they lie beside the graph, as a protobuf ends at 2 GiB


class Onnx(Target):
    """A graph from images [batch, C, H, W] to logits [batch, classes] or, without a head, to features.

    The batch is dynamic, the size of the images is that of the weights.
    """

    name = "onnx"
    weights_file = "model.onnx"
    suffixes = (".onnx",)
    fixed_size = True
    library = "onnxruntime"

    def outputs(self, weights: Weights) -> tuple[str, ...]:
        return ("logits",) if weights.num_classes else ("features",)

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
        # The masked backend is plain PyTorch where nothing is masked, which the exporter understands.
        weights = weights.per_image()
        model = weights.classifier("masked") if weights.num_classes else weights.encoder("masked")
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (torch.zeros(2, model.in_chans, *model.image_size),),
                file,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(self.outputs(weights)),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=size > ONE_FILE,
                verbose=False,
            )
        return f"exported {'the classifier' if weights.num_classes else 'the encoder'} with a dynamic batch"

    def run(self, path: Path, weights: Weights, images: Tensor) -> Outputs:
        """The first image is run by itself and the others in a batch of all, so that a batch that is fixed shows."""
        file = path if path.is_file() else path / self.weights_file
        session = entry("onnxruntime", "InferenceSession")(str(file), providers=["CPUExecutionProvider"])
        (name,) = self.outputs(weights)
        alone, together = (
            torch.from_numpy(session.run([name], {"images": batch.numpy()})[0]) for batch in (images[:1], images)
        )
        return {name: torch.cat([alone, together[1:]])}
