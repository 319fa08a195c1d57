"""Lets a benchmark see every kernel that is called, without changing the kernels or their callers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Observer = Callable[..., Any]
_observers: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Within the block, `observer(run, kernel, *arguments, **options)` is called in place of each kernel.

    run: calls the kernel with the arguments and options that it is given. kernel: a C++ kernel's name, or a Triton
    kernel. What the observer returns is the kernel's result.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def call(run: Callable[..., Any], kernel: Any, *arguments: Any, **options: Any) -> Any:
    """Runs a kernel, or has the innermost observer run it."""
    if not _observers:
        return run(kernel, *arguments, **options)
    return _observers[-1](run, kernel, *arguments, **options)
