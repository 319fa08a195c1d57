"""Loads the C++ kernels that suit this CPU, and calls them."""

import ctypes
from functools import cache
from pathlib import Path

import torch  # first, so that the kernels share its OpenMP runtime and thus its thread pool

ABI = 2  # of the functions' signatures, as in abi.cpp
SETS = ["avx512_bf16", "avx512", "avx2", "baseline"]  # builds, the best first

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_STORED = [_POINTER, _INT]  # address, whether it holds bfloat16
_BLOCKS = [_POINTER, _POINTER, *[_LONG] * 4, _INT, _LONG]  # slot, index, first, blocks, rows, cols, side, channels
_SIGNATURES = {
    "block_dwconv": [*_STORED, *[_POINTER] * 5, *_BLOCKS, _POINTER, *_STORED, _INT],
    "block_dwconv_weight": [*_STORED, _POINTER, *_BLOCKS, _POINTER, _INT],
    "layer_norm": [*_STORED, _POINTER, _POINTER, _LONG, _INT, _LONG, _INT, *_STORED, _INT],
    "layer_norm_backward": [*_STORED, *_STORED, _POINTER, _LONG, _INT, _LONG, _INT, _POINTER, _POINTER, _INT],
    "one_mask": [_POINTER, _POINTER, *[_LONG] * 4, _POINTER, _LONG, _INT],
    "gelu_grn": [*_STORED, *[_POINTER] * 4, _LONG, _LONG, _POINTER, _POINTER, _INT],
    "gelu_grn_backward": [_POINTER, *_STORED, *[_POINTER] * 5, _LONG, _LONG, *[_POINTER] * 6, _INT],
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason, in one line."""
    first = {"AVX512": 0, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 3)
    reason = "the C++ kernels were not built (no C++20 compiler when sparse-fcmae was installed)"
    for instruction_set in SETS[first:]:
        for file in sorted(Path(__file__).parent.glob(f"_{instruction_set}.*.so")):
            try:
                library = ctypes.CDLL(str(file))
                abi = library.sparse_fcmae_abi()
            except (OSError, AttributeError) as error:
                reason = f"the C++ kernels can't be loaded: {error}"
                continue
            if abi != ABI:
                reason = f"the C++ kernels of {file.name} are of another version or CPU: install sparse-fcmae again"
                continue
            for name, arguments in _SIGNATURES.items():
                function = getattr(library, f"sparse_fcmae_{name}")
                function.argtypes, function.restype = arguments, _INT if name == "one_mask" else None
            return library, instruction_set
    return None, reason


def instruction_set() -> str | None:
    """The instruction set of the loaded kernels, one of SETS; None where there are none."""
    library, found = _load()
    return found if library else None


def unusable() -> str | None:
    """Why the kernels can't be called, in one line; None where they can."""
    library, reason = _load()
    return None if library else reason


def call(name: str, *arguments: torch.Tensor | int | None) -> int | None:
    """Calls the kernel `sparse_fcmae_<name>`; tensors, which must be contiguous, are passed by address.

    Its last argument, the number of threads, is torch's. Raises RuntimeError where the kernels are unusable.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    raw = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    return getattr(library, f"sparse_fcmae_{name}")(*raw, torch.get_num_threads())
