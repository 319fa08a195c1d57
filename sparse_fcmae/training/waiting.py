"""The wait for images, which a slow or vanished source can make long."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

LONG = 60.0  # seconds of waiting from which on it is said
LOOK = 5.0  # seconds between looks


class Waiting:
    """Waits for images, and says when that takes LONG. A context, in which a thread looks after it.

    say: prints a line. data: what the images are of. since: when the wait began, None while there is none. seconds: of
    all waits since they were last taken.
    """

    def __init__(self, say: Callable[[str], None], data: str) -> None:
        self.say, self.data, self.since, self.seconds = say, data, None, 0.0
        self._over = threading.Event()

    def __enter__(self) -> "Waiting":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()

    def for_next(self, batches: Iterator[T]) -> T:
        """The next item of an iterator, for which is waited."""
        self.since = time.perf_counter()
        try:
            return next(batches)
        finally:
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def take_seconds(self) -> float:
        """The seconds of waiting since this was last called."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _watch(self) -> None:
        said = None
        while not self._over.wait(LOOK):
            since = self.since
            if since is not None and since != said and time.perf_counter() - since >= LONG:
                said = since
                self.say(f"no images have come for {LONG:.0f} seconds: is {self.data} slow, or out of reach?")
