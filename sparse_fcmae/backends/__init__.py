"""Backends: how the features of one batch are laid out, and the operations that depend on it.

A backend is a class, constructed with the mask of a batch, with the five methods of `Layout`. Everything else in the
encoder works on the last dimension alone and is the same for all of them.
"""

import logging
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from sparse_fcmae.backends.blocks import NativeLayout, TorchLayout
from sparse_fcmae.backends.masked import MaskedLayout
from sparse_fcmae.errors import UserError


class Layout(Protocol):
    """Features of B images over a grid of rows x cols patches, P x P positions a patch; `...` is the backend's own."""

    name: str

    def __init__(self, mask: Tensor) -> None:
        """mask: bool [B, rows, cols], True = masked."""

    @staticmethod
    def unusable(device: torch.device) -> str | None:
        """Why this backend can't run on `device`, in one line; None where it can."""

    def enter(self, x: Tensor) -> Tensor:
        """[B, C, rows * P, cols * P] -> features [..., C] at the visible positions."""

    def tile_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A convolution whose stride is its kernel size, so that its windows tile the patches."""

    def dwconv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Submanifold 7x7 depthwise convolution."""

    def gelu_grn(self, x: Tensor, gamma: Tensor, scope: str) -> Tensor:
        """GELU(x) * (1 + gamma * N), N pooled over the visible positions of each "image" or of the "batch"."""

    def leave(self, x: Tensor) -> Tensor:
        """Features of one position a patch -> [B, C, rows, cols], zeros where masked."""


BACKENDS: dict[str, type[Layout]] = {layout.name: layout for layout in (NativeLayout, TorchLayout, MaskedLayout)}


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


@cache
def resolve_backend(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> type[Layout]:
    """The backend to run features of a dtype on a device: "auto" is `native` where usable, else `torch`, said once.

    Raises UserError where a backend asked for by name can't run there.
    """
    check_backend(name)
    layout = BACKENDS["native" if name == "auto" else name]
    reason = layout.unusable(torch.device(device_type))
    if not reason and layout is NativeLayout and dtype not in (torch.float32, torch.bfloat16):
        reason = f"its kernels take float32 and bfloat16, not {dtype}"
    if reason and name != "auto":
        raise UserError(f"backend {name} can't be used: {reason}; choose another --backend or auto")
    if reason:
        logging.getLogger("sparse_fcmae").warning("sparse-fcmae: using the slower torch backend: %s", reason)
        return TorchLayout
    return layout


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's matrix products: autocast's where that is on, else its parameters'."""
    weight = next(module.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
