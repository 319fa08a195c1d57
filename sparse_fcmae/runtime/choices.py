"""Choices among ways to compute the same, made by timing the ways on this machine.

Ways round differently. So a choice that was made holds: in a process for good, on a machine as long as the user's cache
has it, and in a run through its checkpoints, on whatever machine it goes on.
"""

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from sparse_fcmae.runtime.cache import cache_folder
from sparse_fcmae.runtime.files import read_json, write_json

ROUNDS = 7  # in which the ways are timed, taking turns
WORTH = 0.75  # of the first way's time that another one stays below: alone, in warm caches, gains look larger

_made: dict[str, str] = {}


def choose(what: str, ways: Callable[[], Mapping[str, Callable[[], object]]]) -> str:
    """The name of the way that was chosen for `what`, or is chosen now.

    ways: makes what is timed, by name. The first one is chosen unless another one is clearly faster. One that can't be
    run is left out; the first can.
    """
    if what not in _made:
        known = _kept()
        _made[what] = known[what] if what in known else _fastest(ways())
        if what not in known:
            with suppress(Exception):  # of a disk that is full, say: it is measured again
                _file().parent.mkdir(parents=True, exist_ok=True)
                write_json(_file(), _kept() | {what: _made[what]})
    return _made[what]


def made() -> dict[str, str]:
    """All choices of this process, for `take_up`."""
    return dict(_made)


def take_up(choices: Mapping[str, str]) -> None:
    """Has this process choose as `made` says."""
    _made.update(choices)


def _fastest(ways: Mapping[str, Callable[[], object]]) -> str:
    first, *others = ways
    ways[first]()
    timed = {first: math.inf}
    for name in others:
        with suppress(Exception):
            ways[name]()
            timed[name] = math.inf
    for name in [*timed] * ROUNDS if len(timed) > 1 else ():
        start = time.perf_counter()
        ways[name]()
        timed[name] = min(timed[name], time.perf_counter() - start)
    return min(timed, key=lambda name: timed[name] * (WORTH if name == first else 1))


def _kept() -> dict[str, str]:
    """What earlier processes have chosen on this machine."""
    with suppress(Exception):  # there is none yet, or it is damaged
        return {str(what): str(name) for what, name in read_json(_file()).items()}
    return {}


def _file() -> Path:
    """The file with the choices of this machine, this torch and this number of threads."""
    machine = [platform.machine(), _processor(), torch.__version__, torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    return cache_folder("choices") / f"{digest}.json"


def _processor() -> str:
    """The processor's name and model, as far as the system says."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return " ".join(sorted({line for line in lines if line.startswith(("model", "cpu family", "stepping"))}))
    return platform.processor()
