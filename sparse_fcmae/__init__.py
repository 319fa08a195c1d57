"""Sparse FCMAE pretraining of ConvNeXt V2: masked patches are skipped, not computed."""

from sparse_fcmae.backends import available_backends
from sparse_fcmae.classifier import create_classifier
from sparse_fcmae.convert import convert
from sparse_fcmae.encoder import create_encoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.evaluate import evaluate
from sparse_fcmae.fcmae import create_fcmae
from sparse_fcmae.formats.weights import load_classifier, load_encoder
from sparse_fcmae.masking import random_mask
from sparse_fcmae.training.finetune import finetune
from sparse_fcmae.training.pretrain import pretrain

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "available_backends",
    "convert",
    "create_classifier",
    "create_encoder",
    "create_fcmae",
    "evaluate",
    "finetune",
    "load_classifier",
    "load_encoder",
    "pretrain",
    "random_mask",
]
