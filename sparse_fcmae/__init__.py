"""Sparse FCMAE pretraining of ConvNeXt V2: masked patches are skipped, not computed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time see __getattr__
    from sparse_fcmae.backends import available_backends as available_backends
    from sparse_fcmae.evaluation.embed import embed as embed
    from sparse_fcmae.evaluation.evaluate import evaluate as evaluate
    from sparse_fcmae.evaluation.predict import predict as predict
    from sparse_fcmae.model.classifier import create_classifier as create_classifier
    from sparse_fcmae.model.convnext import create_encoder as create_encoder
    from sparse_fcmae.model.fcmae import create_fcmae as create_fcmae
    from sparse_fcmae.model.masking import random_mask as random_mask
    from sparse_fcmae.runtime.errors import UserError as UserError
    from sparse_fcmae.tasks.finetuning import finetune as finetune
    from sparse_fcmae.tasks.inspection import inspect as inspect
    from sparse_fcmae.tasks.pretraining import pretrain as pretrain
    from sparse_fcmae.weights.convert import convert as convert
    from sparse_fcmae.weights.read import load_classifier as load_classifier
    from sparse_fcmae.weights.read import load_encoder as load_encoder
    from sparse_fcmae.weights.read import load_fcmae as load_fcmae
    from sparse_fcmae.weights.read import load_transform as load_transform
    from sparse_fcmae.weights.segmenter import load_segmenter as load_segmenter

__version__ = "0.1.0"

PUBLIC = {  # name: the module that it is imported from when it is first used
    "UserError": "runtime.errors",
    "available_backends": "backends",
    "convert": "weights.convert",
    "create_classifier": "model.classifier",
    "create_encoder": "model.convnext",
    "create_fcmae": "model.fcmae",
    "embed": "evaluation.embed",
    "evaluate": "evaluation.evaluate",
    "finetune": "tasks.finetuning",
    "inspect": "tasks.inspection",
    "load_classifier": "weights.read",
    "load_segmenter": "weights.segmenter",
    "load_transform": "weights.read",
    "load_encoder": "weights.read",
    "load_fcmae": "weights.read",
    "predict": "evaluation.predict",
    "pretrain": "tasks.pretraining",
    "random_mask": "model.masking",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
