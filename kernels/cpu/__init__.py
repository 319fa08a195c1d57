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


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason, in one line."""
    sets = ["avx512", "avx2", "baseline"]
    capability = torch.backends.cpu.get_cpu_capability().lower()
    reason = "the C++ kernels were not built (no C++20 compiler when sparse-fcmae was installed)"
    for name in sets[sets.index(capability) if capability in sets else -1 :]:
        for file in sorted(Path(__file__).parent.glob(f"_{name}.*.so")):
            try:
                library = ctypes.CDLL(str(file))
            except OSError as error:
                reason = f"the C++ kernels can't be loaded: {error}"
                continue
            for function, arguments in _SIGNATURES.items():
                getattr(library, function).argtypes = arguments
                getattr(library, function).restype = None
            return library, name
    return None, reason


def instruction_set() -> str | None:
    """The instruction set of the loaded kernels, "avx512", "avx2" or "baseline"; None where there are none."""
    library, name = _load()
    return name if library else None


def unusable() -> str | None:
    """Why the kernels can't be called, in one line; None where they can."""
    library, reason = _load()
    return None if library else reason


def call(name: str, *arguments: torch.Tensor | int | None) -> None:
    """Calls the kernel `sparse_fcmae_<name>`; tensors, which must be contiguous, are passed by address.

    Its last argument, the number of threads, is torch's. Raises RuntimeError where the kernels are unusable.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    raw = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    getattr(library, f"sparse_fcmae_{name}")(*raw, torch.get_num_threads())
