"""Kernels: C++ for the CPU, Triton for GPUs.

Both folders have a module for each op, of the op's name, and in it functions of the same names and arguments. A module
is found by its name, so a new op needs no entry here.
"""

from importlib import import_module
from types import ModuleType

import torch


def platform(device: torch.device) -> str:
    """The folder with the kernels for tensors on a device: "cpu" or "triton"."""
    return "cpu" if device.type == "cpu" else "triton"


def of(device: torch.device) -> ModuleType:
    """The package of a device's kernels, which says what they take and whether they can run.

    Raises ImportError for a GPU where Triton is missing, as it is beside CPU builds of torch.
    """
    return import_module(f"{__name__}.{platform(device)}")


def load(op: str, device: torch.device) -> ModuleType:
    """The module with an op's kernels for tensors on a device."""
    return import_module(f"{__name__}.{platform(device)}.{op}")


def unusable(device: torch.device) -> str | None:
    """Why there are no kernels for a device, in one line; None where there are."""
    try:
        return of(device).unusable(device)
    except ImportError as error:
        return f"the Triton kernels can't be loaded: {error}"


def unfit(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the kernels for a device can't run on features of these dtypes, in one line; None where they can."""
    known = of(device).DTYPES
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in known)
    return next((f"the {device.type} kernels take {names}, not {d}" for d in dtypes if d not in known), None)


def check_dtype(op: str, device: torch.device, *dtypes: torch.dtype) -> None:
    """Raises ValueError where the kernels for a device can't run on features of these dtypes."""
    if reason := unfit(device, *dtypes):
        raise ValueError(f"{op}: {reason}")
