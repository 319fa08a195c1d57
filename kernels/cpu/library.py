"""Loads the C++ kernels that suit this CPU, and makes functions of them."""

import ctypes
from functools import cache
from pathlib import Path

import torch  # first, so that the kernels share its OpenMP runtime and thus its thread pool

from sparse_fcmae.kernels import observe
from sparse_fcmae.kernels.constants import ABI

SETS = ["avx512_bf16", "avx512", "avx2", "baseline"]  # instruction sets that there are builds for, the best first

POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
TENSOR = (POINTER, INT)  # features: the address, and whether they are bfloat16 rather than float32
Argument = torch.Tensor | int | None


class Kernel:
    """The C function `sparse_fcmae_<name>` of the loaded library, with its argument types.

    Its last argument, the number of threads, is added by each call and always torch's own.
    """

    def __init__(self, name: str, *arguments: type | tuple[type, ...], result: type | None = None) -> None:
        self.name, self.result = name, result
        self.arguments = [t for a in arguments for t in (a if isinstance(a, tuple) else (a,))] + [INT]

    def __call__(self, *arguments: Argument) -> int | None:
        """Calls it; tensors, which must be contiguous, are passed by address.

        Raises RuntimeError where the kernels are unusable.
        """
        return observe.call(self._run, self.name, *arguments)

    def _run(self, name: str, *arguments: Argument) -> int | None:
        raw = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
        return _function(self)(*raw, torch.get_num_threads())


@cache
def _function(kernel: Kernel) -> ctypes._CFuncPtr:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    function = getattr(library, f"sparse_fcmae_{kernel.name}")
    function.argtypes, function.restype = kernel.arguments, kernel.result
    return function


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
            if abi == ABI:
                return library, instruction_set
            reason = f"the C++ kernels of {file.name} are of another version or CPU: install sparse-fcmae again"
    return None, reason


def instruction_set() -> str | None:
    """The instruction set of the loaded kernels, one of SETS; None where there are none."""
    library, found = _load()
    return found if library else None


def unusable() -> str | None:
    """Why the kernels can't be called, in one line; None where they can."""
    library, reason = _load()
    return None if library else reason


def bf16(features: torch.Tensor) -> int:
    """What TENSOR says of features beside their address."""
    return int(features.dtype == torch.bfloat16)
