"""Ctrl-C and SIGTERM end a run after its step, with a checkpoint."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sparse_fcmae.runtime.terminal import lost_if_unread


@contextmanager
def stop_signals(world: int) -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C or SIGTERM came. Ctrl-C after that raises KeyboardInterrupt at once.

    A second SIGTERM changes nothing, as batch systems send it to a process and to its group. It is for a run of one
    process: many processes could not agree on the step to stop at.
    """
    received = []

    def stop(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            with lost_if_unread():
                print("\nstopping after this step; Ctrl-C to stop at once", file=sys.stderr)
        received.append(number)

    if world > 1 or threading.current_thread() is not threading.main_thread():  # others can't have handlers
        yield lambda: False
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
