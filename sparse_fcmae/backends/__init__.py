"""Backends: how the features of one batch are laid out, and the operations that depend on it.

A backend is a `Layout`, constructed with the mask of a batch. All else in the encoder is the same for all of them.
"""

import logging
from functools import cache

import torch

from sparse_fcmae.backends.blocks import NativeLayout, TorchLayout
from sparse_fcmae.backends.layout import Layout
from sparse_fcmae.backends.masked import MaskedLayout
from sparse_fcmae.backends.minkowski import MinkowskiLayout
from sparse_fcmae.errors import UserError

LAYOUTS = (NativeLayout, TorchLayout, MaskedLayout, MinkowskiLayout)
BACKENDS: dict[str, type[Layout]] = {layout.name: layout for layout in LAYOUTS}


def default_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend by name: None where it is usable on `device` (`default_device()` if None), else the reason."""
    device = torch.device(device) if device else default_device()
    return {name: layout.unusable(device) for name, layout in BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raises UserError for a name that is no backend's."""
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: choose one of auto, {', '.join(BACKENDS)}")


@torch.compiler.assume_constant_result  # what it looks at can't be traced, and does not change
def resolve_backend(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> type[Layout]:
    """The backend to run features of a dtype on a device: "auto" is `native` where usable, else `torch`, said once.

    Raises UserError where a backend asked for by name can't run there.
    """
    return _resolve(name, device_type, dtype)


@cache
def _resolve(name: str, device_type: str, dtype: torch.dtype) -> type[Layout]:
    check_backend(name)
    layout = BACKENDS["native" if name == "auto" else name]
    device = torch.device(device_type)
    reason = layout.unusable(device, dtype)
    if reason and name != "auto":
        raise UserError(f"backend {name} can't be used: {reason}; choose another --backend or auto")
    if reason:
        logging.getLogger("sparse_fcmae").warning("sparse-fcmae: using the slower torch backend: %s", reason)
        return TorchLayout
    return layout
