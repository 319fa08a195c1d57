"""Which tiles a kernel runs with: the fastest of a few, timed at the first call with a shape and kept on disk."""

import os
from collections.abc import Callable
from typing import Any

import triton

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
    raise ImportError(f"they need Triton 3.4 or newer, not {triton.__version__}")

WARP = 32  # threads
MOST_ROWS = 32
TILES = [triton.Config({"R": r}, num_warps=w) for r in (MOST_ROWS, 16, 8, 4, 2, 1) for w in (1, 2, 4, 8, 16)]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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

    return triton.autotune(
        configs[:1] if INTERPRETED else configs,
        key=[*key, "magnitude"],
        prune_configs_by={"early_config_prune": prune} if suits else None,
        restore_value=list(overwritten),
        cache_results=True,
    )
