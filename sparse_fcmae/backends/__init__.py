"""Backends: how the features of a batch's visible patches are held, and what depends on it.

A backend is a subclass of `patches.Patches` in a file of its own, and one entry of BACKENDS. All else in the network is
the same for all of them.
"""

from functools import cache

import torch

from sparse_fcmae.backends.masked import MaskedPatches
from sparse_fcmae.backends.minkowski import MinkowskiPatches
from sparse_fcmae.backends.native import NativePatches
from sparse_fcmae.backends.patches import Patches
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.ops.context import transformed
from sparse_fcmae.runtime.device import default_device
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.notices import say_once

BACKENDS: dict[str, type[Patches]] = {
    "native": NativePatches,
    "torch": TorchPatches,
    "masked": MaskedPatches,
    "minkowski": MinkowskiPatches,
}


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend by name: None where it is usable on `device` (a GPU if there is one), else the reason why not."""
    device = torch.device(device) if device else default_device()
    return {name: backend.unusable(device) for name, backend in BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raises UserError for a name that is no backend's."""
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"unknown backend {name!r}: choose one of auto, {', '.join(BACKENDS)}")


def choose_dtype(name: str, device: torch.device, backend: str) -> torch.dtype:
    """The autocast dtype of a `dtype` option: "auto" is bfloat16 where device and backend compute in it.

    Raises UserError where the backend can't be used with it.
    """
    if name == "auto" and resolve_backend(backend, device.type).unusable(device, torch.bfloat16):
        name = "fp32"
    elif name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    elif name == "auto":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        name = "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    resolve_backend(backend, device.type, dtype)
    return dtype


def resolve_backend(
    name: str, device_type: str, dtype: torch.dtype = torch.float32, dense: bool = False
) -> type[Patches]:
    """The backend to run features of a dtype on a device. "auto" is `native` where usable, else `torch`, said once.

    dense: to run layers that are dense by design, as the decoder's are, whose patches are all visible. Raises UserError
    where a backend asked for by name can't run there.

    `masked` runs whatever the name says where kernels can't: on the meta device, which has no values, and under
    transforms of `torch.func` and differentiation in forward mode, which is said once.
    """
    return _resolve(name, device_type, dtype, dense, transformed())


def _resolve(name: str, device_type: str, dtype: torch.dtype, dense: bool, under_transforms: bool) -> type[Patches]:
    backend = _usable(name, device_type, dtype)
    if under_transforms and backend is not MaskedPatches:
        say_once("using the slower masked backend under torch.func and in forward mode")
        return MaskedPatches
    return BACKENDS[backend.dense_backend] if dense and backend.dense_backend else backend


# torch.compile takes the result as a constant: what it depends on can't be traced, and does not change. This is what
# torch.compiler.assume_constant_result does, which takes more than a second to import the compiler.
_resolve._dynamo_marked_constant = True


@cache
def _usable(name: str, device_type: str, dtype: torch.dtype) -> type[Patches]:
    check_backend(name)
    if device_type == "meta":
        return MaskedPatches
    backend = BACKENDS["native" if name == "auto" else name]
    reason = backend.unusable(torch.device(device_type), dtype)
    if reason and name != "auto":
        raise UserError(f"`backend` {name} can't be used: {reason}; choose another or `backend=auto`")
    if reason:
        say_once(f"using the slower torch backend: {reason}")
        return TorchPatches
    return backend
