"""The options of `sparse-fcmae convert`."""

from dataclasses import dataclass

from sparse_fcmae.runtime.options import option

TARGETS = ("official", "timm", "huggingface", "mmpretrain", "fcmae", "onnx", "torch-export", "aotinductor")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `sparse-fcmae convert`."""

    source: str = option(
        help="run, checkpoint or exported folder, weights of any layout, or a name as timm:convnextv2_tiny.fcmae",
        path=True,
        positional=True,
    )
    destination: str = option(
        help="folder, or .safetensors, .pt, .pth, .onnx or .pt2 file, to make", path=True, positional=True
    )
    to: str = option(help="layout to write", choices=TARGETS)
    half: bool = option(False, help="in float16, of graphs: onnx, torch-export and aotinductor")
    overwrite: bool = option(False, help="replace the files of an earlier conversion")
    dry_run: bool = option(False, help="do and verify it all, print the report, leave nothing")
