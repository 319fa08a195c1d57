"""Finds the rank for which all others wait: one that reads images that do not come, is stopped, or has lost its GPU."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch.distributed as dist

from sparse_fcmae.runtime.distributed import Ranks, new_store
from sparse_fcmae.training.waiting import Waiting

BEAT = 2.0  # seconds between signs of life
SILENT = 5  # beats without a sign after which a rank counts as stopped


class Sign(NamedTuple):
    """What a rank says of itself: how often it has, the steps that it has done, and whether it waits for images."""

    beat: int
    step: int
    waits: bool


class Watch:
    """Has ranks tell each other what they do, and ends a run whose ranks have not done a step for some time.

    A context, in which a thread does it, by the store that the processes met by and not by collectives, which would
    hang as well. step: that are done; the loop counts it up. minutes: without a step, or in an evaluation without a
    sign of life from a rank, after which the run ends. say: takes the line that names the rank. The process then ends
    at once, and torchrun ends or restarts the others.
    """

    def __init__(self, ranks: Ranks, waiting: Waiting, minutes: float, step: int, say: Callable[[str], None]) -> None:
        self.ranks, self.waiting, self.seconds, self.say = ranks, waiting, 60 * minutes, say
        self.step, self.resting = step, False
        self._over = threading.Event()
        self._last = [
            (Sign(-1, -1, False), 0)
        ] * ranks.world  # each rank's newest sign, and for how many beats it is that

    def __enter__(self) -> "Watch":
        if self.ranks.world > 1:
            self.store = dist.PrefixStore("sparse_fcmae/watch", new_store(self.ranks.world))
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()

    @contextmanager
    def rest(self) -> Iterator[None]:
        """What takes its time without doing steps, such as an evaluation."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

    def _look(self) -> None:
        beat, seen, since = 0, self.step, time.monotonic()
        while not self._over.wait(BEAT):
            beat += 1
            self._tell(Sign(beat, self.step, self.waiting.since is not None))
            self._listen()
            if self.step != seen or self.resting:
                seen, since = self.step, time.monotonic()
            silent = BEAT * max(beats for _, beats in self._last)  # in an evaluation too
            if (passed := max(time.monotonic() - since, silent)) >= self.seconds:
                self._end(passed)

    def _tell(self, sign: Sign) -> None:
        with suppress(RuntimeError):  # the store ends with the process that keeps it
            self.store.set(str(self.ranks.rank), ",".join(str(int(value)) for value in sign))

    def _listen(self) -> None:
        for rank, (before, beats) in enumerate(self._last):
            sign = before
            with suppress(RuntimeError):
                if self.store.check([str(rank)]):
                    sign = Sign(*map(int, self.store.get(str(rank)).decode().split(",")))
            self._last[rank] = (sign, 0) if sign != before else (before, beats + 1)

    def hanging(self) -> tuple[list[int], str]:
        """The ranks that the others wait for, and what is the matter with them."""
        signs = {rank: sign for rank, (sign, _) in enumerate(self._last)}
        silent = [rank for rank, (_, beats) in enumerate(self._last) if beats >= SILENT]
        if silent:
            return silent, "gives no sign of life"
        least = min(sign.step for sign in signs.values())
        behind = [rank for rank, sign in signs.items() if sign.step == least]
        waiting = [rank for rank in behind if signs[rank].waits]
        if waiting:
            return waiting, "waits for images"
        return behind, "does not go on" if len(behind) < len(signs) else "does not go on, as all others"

    def _end(self, seconds: float) -> None:
        """Says which rank hangs, on the first one that does not, and ends this process."""
        hanging, what = self.hanging()
        others = [rank for rank in range(self.ranks.world) if rank not in hanging] or hanging
        if self.ranks.rank == others[0]:
            names = ", ".join(map(str, hanging))
            text = f"no step for {seconds:.0f} seconds after step {self.step}: rank {names} {what}"
            with suppress(Exception):
                self.say(text)
            print(f"\nsparse-fcmae: {text}", file=sys.stderr, flush=True)  # below the bar
            os._exit(1)
