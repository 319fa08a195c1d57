"""Signals that end a run after its step, with a checkpoint: Ctrl-C, and what batch systems send."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.signals import STOPPING
from sparse_fcmae.runtime.terminal import lost_if_unread
from sparse_fcmae.training.waiting import Waiting

SAME = 2.0  # seconds in which signals count as one, as batch systems and torchrun send them to a process and its group
PATIENCE = 10.0  # seconds that a run that is to stop waits for the images of its step
LOOK_SECONDS = 1.0  # about so often the ranks tell each other of signals


class StoppedWaiting(BaseException):
    """A run of one process is to stop, and its step can't be finished, as no images come.

    No Exception, as what reads images takes any of these for a broken file.
    """


class StopSignals:
    """Whether the run is to stop. The ranks agree on the step after which they do.

    waiting: in which the step can't be finished. start: the steps that are done already.
    """

    def __init__(self, ranks: Ranks, waiting: Waiting, start: int) -> None:
        self.ranks, self.waiting, self.first = ranks, waiting, None
        self.looked_at = self.next_look = start
        self.since = time.monotonic()

    def receive(self, number: int, frame: Any) -> None:
        """The first signal is noted. One that comes later ends the process at once, by KeyboardInterrupt."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
            if self.ranks.main:
                with lost_if_unread():
                    print("\nstopping after this step; once more to stop at once", file=sys.stderr)
            if self.ranks.world == 1 and hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
        elif now - self.first > SAME or (number == signal.SIGINT and self.ranks.world == 1):
            raise KeyboardInterrupt

    def look(self, number: int, frame: Any) -> None:
        """Raises StoppedWaiting where the run was to stop for PATIENCE, and images are waited for."""
        if self.waiting.since is not None:
            raise StoppedWaiting

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after so many steps, as one of them has received a signal.

        All ranks call this after each step. They ask each other about every LOOK_SECONDS, be steps short or long.
        """
        if self.ranks.world == 1:
            return self.first is not None
        if step < self.next_look:
            return False
        seconds = (time.monotonic() - self.since) / max(1, step - self.looked_at)
        found = self.ranks.gather((self.first is not None, seconds))
        slowest = max(seconds for _, seconds in found)
        self.looked_at, self.since = step, time.monotonic()
        self.next_look = step + max(1, round(LOOK_SECONDS / max(slowest, 1e-3)))
        return any(received for received, _ in found)


@contextmanager
def stop_signals(ranks: Ranks, waiting: Waiting, start: int = 0) -> Iterator[StopSignals]:
    """Notes the signals of STOPPING while the block runs, but for those that are ignored, as by nohup."""
    stop = StopSignals(ranks, waiting, start)
    if threading.current_thread() is not threading.main_thread():  # others can't have handlers
        yield stop
        return
    heeded = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, stop.receive) for number in heeded}
    if hasattr(signal, "setitimer"):
        old[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop.look)
    try:
        yield stop
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
