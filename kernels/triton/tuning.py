"""Which tiles a kernel runs with: the fastest of a few, timed at the first call with a shape and kept on disk."""

import os
from collections.abc import Callable
from typing import Any

import triton

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
    raise ImportError(f"they need Triton 3.4 or newer, not {triton.__version__}")

WARP = 32  # threads
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tuned(
    configs: list[triton.Config],
    key: list[str],
    suits: Callable[..., bool] | None = None,
    overwritten: tuple[str, ...] = (),
) -> Callable:
    """A decorator that has a kernel run with the fastest of the configs for which `suits(config, arguments)` holds.

    They are timed once for each value of the arguments in `key` and dtypes of the tensors, those that the kernel may
    have `overwritten` being given back each time. The interpreter, where times mean nothing, takes the first config.
    """

    def prune(configs: list[triton.Config], _: dict[str, Any], **arguments: Any) -> list[triton.Config]:
        return [config for config in configs if suits(config, arguments)]

    return triton.autotune(
        configs[:1] if INTERPRETED else configs,
        key=key,
        prune_configs_by={"early_config_prune": prune} if suits else None,
        restore_value=list(overwritten),
        cache_results=True,
    )


def tiles(sizes: tuple[int, ...]) -> list[triton.Config]:
    """Configs of R rows, of the sizes, by all numbers of warps."""
    return [triton.Config({"R": r}, num_warps=w) for r in sizes for w in (1, 2, 4, 8, 16)]


def per_thread(config: triton.Config, width: int) -> int:
    """Elements that a thread has of a tensor [R, width]."""
    return config.kwargs["R"] * width // (WARP * config.num_warps)
