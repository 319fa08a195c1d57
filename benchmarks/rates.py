"""What a machine reaches at best: the bytes it copies in a second, and the operations of its matrix products."""

from collections.abc import Iterable
from functools import partial

import torch

from sparse_fcmae.backends import choose_dtype
from sparse_fcmae.benchmarks.engine import Candidate, take_turns

COPIED = 1 << 26  # float32 numbers
SIDE, SLOW_SIDE = 2048, 512  # rows and columns of the matrices
GPU_SCALE = 4  # times as much on a GPU
Rates = dict[str | torch.dtype, float]


def measure_rates(device: torch.device, dtypes: Iterable[torch.dtype], rounds: int) -> Rates:
    """ "bytes": read and written in a second by a large copy. By dtype: operations in a second of a large product."""
    scale = GPU_SCALE if device.type == "cuda" else 1
    source, target = torch.zeros(2, scale * COPIED, device=device).unbind()
    candidates = [Candidate("bytes", lambda: partial(target.copy_, source))]
    work: Rates = {"bytes": 2 * source.nbytes}
    for dtype in dict.fromkeys(dtypes):
        # a product in bfloat16 takes a hundred times as long where a CPU has no instructions for it
        slow = dtype == torch.bfloat16 and choose_dtype("auto", device, "auto") != dtype
        side = scale * (SLOW_SIDE if slow else SIDE)
        square, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        candidates.append(Candidate(dtype, lambda square=square, out=out: partial(torch.mm, square, square, out=out)))
        work[dtype] = 2 * side**3
    seconds = take_turns(candidates, rounds, device).seconds
    return {name: work[name] / min(seconds[name]) for name in work}
