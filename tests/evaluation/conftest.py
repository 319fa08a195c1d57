import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture
def on_ranks():
    """Calls a function with each of some ranks, which are threads here, and returns what it gives."""

    def run(world, function):
        barrier, values = threading.Barrier(world, timeout=60), [None] * world

        class Ranks:
            def __init__(self, rank):
                self.rank, self.world = rank, world

            def main_first(self, do):
                return do()

            def gather(self, value):
                values[self.rank] = value
                barrier.wait()
                gathered = list(values)
                barrier.wait()
                return gathered

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(function, [Ranks(rank) for rank in range(world)]))

    return run
