"""Sparse FCMAE pretraining of ConvNeXt V2."""

from sparse_fcmae.backends import available_backends
from sparse_fcmae.encoder import create_encoder
from sparse_fcmae.masking import random_mask

__version__ = "0.1.0"
__all__ = ["available_backends", "create_encoder", "random_mask"]
