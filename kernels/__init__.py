"""Kernels: C++ for the CPU, Triton for GPUs. The modules have functions of the same names and arguments."""

from types import ModuleType

import torch

from sparse_fcmae.kernels import cpu


def of(device: torch.device) -> ModuleType:
    """The module with the kernels for tensors on a device."""
    if device.type == "cpu":
        return cpu
    from sparse_fcmae.kernels import triton  # needs Triton, which CPU builds of torch come without

    return triton


def unusable(device: torch.device) -> str | None:
    """Why there are no kernels for a device, in one line; None where there are."""
    if device.type == "cpu":
        return cpu.unusable()
    try:
        return of(device).unusable(device)
    except ImportError as error:
        return f"the Triton kernels can't be loaded: {error}"


def unfit(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why the kernels for a device can't run on features of these dtypes, in one line; None where they can."""
    known = of(device).DTYPES
    names = " or ".join(str(d).removeprefix("torch.") for d in known)
    return next((f"the {device.type} kernels take {names}, not {d}" for d in dtypes if d not in known), None)


def check_dtype(op: str, device: torch.device, *dtypes: torch.dtype) -> None:
    """Raises ValueError where they can't."""
    if reason := unfit(device, *dtypes):
        raise ValueError(f"{op}: {reason}")
