"""Loads the C++ kernels that suit this CPU, and calls them."""

import ctypes
from functools import cache
from pathlib import Path

import torch  # first, so that the kernels share its OpenMP runtime and thus its thread pool

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_BLOCKS = [_POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _LONG, _INT]  # slot, index, blocks, rows, cols, side, C, bf16
_IMAGES = [_LONG, _LONG, _INT]  # images, channels, bf16
_SIGNATURES = {
    "sparse_fcmae_block_dwconv": [_POINTER, _POINTER, _POINTER, *_BLOCKS, _POINTER, _INT],
    "sparse_fcmae_block_dwconv_weight": [_POINTER, _POINTER, *_BLOCKS, _POINTER, _POINTER, _INT],
    "sparse_fcmae_gelu_grn": [_POINTER, _POINTER, _POINTER, *_IMAGES, _POINTER, _POINTER, _INT],
    "sparse_fcmae_gelu_grn_backward": [*[_POINTER] * 5, *_IMAGES, _POINTER, _POINTER, _INT],
}


def instruction_set() -> str:
    """The build to load: "avx512", "avx2" or "baseline", by what torch found this CPU to have."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.lower() if capability in ("AVX512", "AVX2") else "baseline"


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    found = sorted(Path(__file__).parent.glob(f"_{instruction_set()}.*.so"))
    if not found:
        return None, "the C++ kernels were not built (no C++20 compiler when sparse-fcmae was installed)"
    try:
        loaded = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"the C++ kernels can't be loaded: {error}"
    for name, arguments in _SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
        getattr(loaded, name).restype = None
    return loaded, None


def unusable() -> str | None:
    """Why the kernels can't be called, in one line; None where they can."""
    return _load()[1]


def call(name: str, *arguments: torch.Tensor | int | None) -> None:
    """Calls the kernel `sparse_fcmae_<name>`; tensors, which must be contiguous, are passed by address.

    Its last argument, the number of threads, is torch's. Raises RuntimeError where the kernels are unusable.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    raw = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    getattr(library, f"sparse_fcmae_{name}")(*raw, torch.get_num_threads())
