"""The learning-rate range test: a short run whose rate rises, from whose losses one sees which rate serves.

After Smith (2017), section 3.3, with a rate that rises exponentially.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.training.plots import draw_lr_range

STEPS = 100  # where the user does not say how many
SMOOTHING = 0.9  # of the losses, as an exponential moving average
FEWEST = 20  # steps from which something can be seen


def range_of_rates(value: str) -> tuple[float, float]:
    """The first and the last rate of "1e-6,1". Raises UserError for anything else."""
    try:
        first, last = map(float, value.split(","))
    except ValueError:
        first = last = math.nan
    if not 0 < first < last < math.inf:
        raise UserError(f"`lr_range` {value}: give the first and the last learning rate, as 1e-6,1")
    return first, last


def rising_lr(step: int, steps: int, first: float, last: float) -> float:
    """The rate of a step counted from 0."""
    return first * (last / first) ** (step / max(1, steps - 1))


def what_it_showed(run: Path) -> tuple[str, Callable[[], None]]:
    """What a range test's metrics say of the rate, in a line, and what draws RUN/lr-range.png, for which see `draw`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = np.array([row["lr"] for row in rows])
    losses = np.array([row["loss"] for row in rows], dtype=float)  # NaN for null
    known = np.isfinite(losses)
    rates, losses = rates[known], losses[known]
    if len(losses) < FEWEST:
        few = f"the range test has {len(losses)} steps with a finite loss, too few to tell: give --max-steps"
        return few, lambda: None
    smooth = smoothed(losses)
    least = int(smooth.argmin())
    falling = np.gradient(smooth, np.log(rates))[: least + 1]
    steepest = float(rates[int(falling.argmin())])
    draw = partial(draw_lr_range, run / "lr-range.png", rates, losses, smooth, steepest)
    if not least:
        return f"the loss never fell, from a rate of {rates[0]:.2g} on: give --lr-range a lower one to begin with", draw
    fell, was = f"{steepest:.2g}", f"{rates[least]:.2g}"
    return f"the loss fell fastest at a rate of {fell} and was least at {was}: try --lr {fell}", draw


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The exponential moving average of losses, whose first ones count no more than they should."""
    average, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average / (1 - SMOOTHING**step))
    return np.array(found)
