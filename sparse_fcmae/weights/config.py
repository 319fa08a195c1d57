"""The options of `sparse-fcmae convert`."""

from dataclasses import dataclass

from sparse_fcmae.runtime.options import option

TARGETS = ("official", "timm", "huggingface", "mmpretrain", "fcmae", "onnx")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `sparse-fcmae convert`."""

    source: str = option(
        help="run, checkpoint or exported folder, or weights of any layout", path=True, positional=True
    )
    destination: str = option(
        help="folder, or .safetensors, .pt, .pth or .onnx file, to make", path=True, positional=True
    )
    to: str = option(help="layout to write", choices=TARGETS)
    overwrite: bool = option(False, help="replace the files of an earlier conversion")
    dry_run: bool = option(False, help="do and verify it all, print the report, leave nothing")
