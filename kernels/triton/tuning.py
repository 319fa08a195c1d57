"""Which tiles a kernel runs with: the fastest of a few, timed at the first call with a shape and kept on disk."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import triton
import triton.testing

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 5):
    raise ImportError(f"they need Triton 3.5 or newer, not {triton.__version__}")

WARP = 32  # threads
MOST_ROWS = 32
TILES = [triton.Config({"R": r}, num_warps=w) for r in (MOST_ROWS, 16, 8, 4, 2, 1) for w in (1, 2, 4, 8, 16)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARMUP_MS, TIMED_MS = 5, 20  # of each tile: hundreds of calls of most kernels


class Tuned(triton.runtime.Autotuner):
    """An autotuner that compiles all tiles of a shape at once, on all cores, before it times them one by one."""

    def prune_configs(self, kwargs: dict[str, Any]) -> list[triton.Config]:
        """Called for a shape that has no tile yet, with the kernel's tensors and numbers in `nargs`."""
        configs = super().prune_configs(kwargs)
        sizes = {name: value for name, value in kwargs.items() if name != "warmup"}
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:  # one that can't be compiled is refused again, and left out, when it is timed
                self.fn.warmup(*self.nargs.values(), **sizes, **config.all_kwargs())
        return configs


def tuned(
    configs: list[triton.Config],
    key: list[str],
    suits: Callable[..., bool] | None = None,
    overwritten: tuple[str, ...] = (),
) -> Callable:
    """A decorator that has a kernel run with the fastest of the configs for which `suits(config, arguments)` holds.

    They are timed once for each value of the arguments in `key`, of `magnitude` (see `launch`), and of the tensors'
    dtypes; tensors that the kernel may have `overwritten` are given back each time. The interpreter, where times mean
    nothing, takes the first config.
    """

    def prune(configs: list[triton.Config], _: dict[str, Any], **arguments: Any) -> list[triton.Config]:
        return [config for config in configs if suits(config, arguments)]

    def decorate(kernel: Any) -> Tuned:
        return Tuned(
            kernel,
            kernel.arg_names,
            configs[:1] if INTERPRETED else configs,
            [*key, "magnitude"],
            reset_to_zero=None,
            restore_value=list(overwritten),
            prune_configs_by={"early_config_prune": prune} if suits else None,
            do_bench=partial(triton.testing.do_bench, warmup=WARMUP_MS, rep=TIMED_MS),
            cache_results=True,
        )

    return decorate
