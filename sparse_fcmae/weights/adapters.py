"""All libraries. A new one is a file beside this one, a line in `ADAPTERS`, and its name in `config.TARGETS`."""

from sparse_fcmae.weights.adapter import Adapter, Target
from sparse_fcmae.weights.fcmae import Fcmae
from sparse_fcmae.weights.huggingface import HuggingFace
from sparse_fcmae.weights.mmpretrain import MMPretrain
from sparse_fcmae.weights.official import Official
from sparse_fcmae.weights.onnx import Onnx
from sparse_fcmae.weights.timm import Timm
from sparse_fcmae.weights.torch_export import AOTInductor, TorchExport

ADAPTERS: tuple[Adapter, ...] = (
    Timm(),
    HuggingFace(),
    Fcmae(),
    MMPretrain(),
    Official(),  # the last one, as the names of Fcmae and MMPretrain have its telltale among them
)
TARGETS: dict[str, Target] = {target.name: target for target in (*ADAPTERS, Onnx(), TorchExport(), AOTInductor())}
