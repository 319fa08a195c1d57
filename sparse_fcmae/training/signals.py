"""Ctrl-C and SIGTERM end a run after its step, with a checkpoint."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(world: int) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C or SIGTERM came. A second one raises KeyboardInterrupt at once.

    It is for a run of one process: many processes could not agree on the step to stop at.
    """
    received = []

    def stop(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    if world > 1 or threading.current_thread() is not threading.main_thread():  # others can't have handlers
        yield lambda: False
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
