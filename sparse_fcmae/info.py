"""The command `info`: what is installed, which device serves, and which backends can be used on it."""

import platform

import torch

from sparse_fcmae import __version__
from sparse_fcmae.backends import available_backends
from sparse_fcmae.kernels import cpu
from sparse_fcmae.runtime.device import default_device


def info() -> str:
    """Versions, device and backends, a line each."""
    device = default_device()
    lines = [
        f"sparse-fcmae {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"device {device}, {torch.get_num_threads()} CPU threads, CPU kernels for {cpu.instruction_set() or 'none'}",
    ]
    backends = available_backends(device).items()
    return "\n".join([*lines, *(f"backend {name:9} {reason or 'usable'}" for name, reason in backends)])
