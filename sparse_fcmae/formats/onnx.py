"""The dense encoder or classifier as an ONNX graph."""

import importlib
import warnings
from pathlib import Path

import torch

from sparse_fcmae.errors import UserError
from sparse_fcmae.formats.weights import Weights

OPSET = 18
ONE_FILE = 1.8e9  # bytes of weights from which they lie beside the graph, as a protobuf ends at 2 GiB


def export_onnx(weights: Weights, file: Path) -> None:
    """Writes images [batch, C, H, W] -> logits [batch, classes], or without a head -> features [batch, D, H/P, W/P].

    The batch is dynamic, the image size that of the weights. Raises UserError where a package is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"--to onnx needs {name}: pip install onnx onnxscript onnxruntime, extra onnx") from None
    weights, classifies = weights.per_image(), weights.num_classes > 0
    # plain PyTorch where nothing is masked
    model = weights.classifier("masked") if classifies else weights.encoder("masked")
    images = torch.zeros(2, model.in_chans, *model.image_size)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            *(model, (images,), file),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits" if classifies else "features"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=size > ONE_FILE,
            verbose=False,
        )


def run_onnx(file: Path, images: torch.Tensor) -> torch.Tensor:
    """The graph's output, by onnxruntime on the CPU."""
    session = importlib.import_module("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
