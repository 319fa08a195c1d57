"""Whether a pretraining run learns, said from what it has measured so far. No labels are needed.

The loss alone says how much of the hidden patches is filled in, by that of the first step, whose weights are new. The
rank of the embeddings and the distance between channels say whether features have collapsed. They say no more than
that: those of random weights are as good (docs/pretraining.md).
"""

import math
from typing import NamedTuple

import numpy as np

from sparse_fcmae.runtime.rows import Rows

LEARNING, EARLY, BROKEN = "learning", "too early to say", "broken"
RANK, DISTANCE, OF_BLOCK = "effective_rank", "channel_distance", "distance_"  # as evaluations.jsonl names them
FIRST, WINDOW = 100, 50  # least steps after the warm-up before anything is said, and least whose mean loss is taken
PART = 0.05  # of the run, which both are where that is more
NOTHING = 0.05  # of the variance of hidden patches: runs that learn were above 0.3 after a tenth of their steps
PATTERN = 0.02  # of the loss of the first step, which is that of a new model where all patches have one colour
LOST = 0.2  # of what was once filled in, from which on a run has lost its way
SKIPPED, IN_A_ROW = 0.05, 5  # of the last steps that may not be finite, and how many may be so at the end
EXPLODED = 2.0  # times the loss of guessing, which is said during the warm-up too
ONE_CHANNEL, ONE_DIRECTION = 0.1, 2.0  # a distance between channels and a rank, below which they are as good as one
RISEN = 0.05  # of the least held-out loss
SLOW = 0.002  # of the variance, which is less than a reader of the curve would see


class Verdict(NamedTuple):
    """What is said of a run: one of LEARNING, EARLY and BROKEN, and why, with what to try."""

    state: str
    reason: str

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


def guessing(losses: np.ndarray, normalised: bool) -> float:
    """What the loss is while nothing is learnt: that of the first step, whose weights are new.

    normalised: whether each target patch has a variance of 1, so that it is no more than that. It is less where patches
    of one colour have nothing to guess.
    """
    first = losses[np.isfinite(losses)][:1]
    found = max(float(first[0]), 1e-9) if len(first) else 1.0
    return min(1.0, found) if normalised else found


def judge(
    metrics: Rows, evaluations: Rows, warmup: int, steps: int, normalised: bool = True, from_weights: bool = False
) -> Verdict:
    """The verdict on a run from the rows of metrics.jsonl and evaluations.jsonl, as far as they go.

    warmup, steps: of the whole run, in optimiser steps. normalised: as in `guessing`. from_weights: whether the run
    goes on from weights, which may fill in something at the start, so that losses are said instead of parts.
    """
    numbers, losses = metrics.numbers("step"), metrics.numbers("loss")
    done = int(numbers[-1]) if len(numbers) else 0
    window, ready = max(WINDOW, round(PART * steps)), min(steps, warmup + max(FIRST, round(PART * steps)))
    if len(losses) < WINDOW // 2:
        return Verdict(EARLY, f"{done} steps are {'too few' if done and done >= steps else 'done'}")
    recent = losses[-window:]
    skipped = 1 - float(np.isfinite(recent).mean())
    if skipped > SKIPPED or not np.isfinite(losses[-IN_A_ROW:]).any():
        many = f"{max(1, round(skipped * len(recent)))} of the last {len(recent)} steps"
        return Verdict(BROKEN, f"{many} were not finite: {_smaller(metrics)}")
    loss, nothing = _mean(recent), guessing(losses, normalised)
    if nothing < PATTERN and not from_weights:
        found = f"there is hardly anything to fill in, as nearly all patches have one colour (first loss {nothing:.2g})"
        return Verdict(BROKEN, f"{found}: look at what the model sees: `sparse-fcmae inspect`")
    if loss > (1 + NOTHING if done >= warmup else EXPLODED) * nothing:
        return Verdict(
            BROKEN, f"the loss is {loss:.4g}, and was {nothing:.2g} before anything was learnt: {_smaller(metrics)}"
        )
    parts = 1 - losses / nothing
    filled, best = _mean(parts[-window:]), _best(parts, window)
    words = f"{_part(max(filled, 0))} of what is hidden is filled in"
    if from_weights:
        words = f"the loss is {loss:.4f}, and was {nothing:.4f} at the start"
    if done < ready:
        return Verdict(EARLY, f"{words}; ask again after step {ready}")
    if filled < NOTHING and not from_weights:
        found = f"after {done} steps nothing of what is hidden is filled in (loss {loss:.4f}, at first {nothing:.4f})"
        advice = "find a learning rate by --lr-range 1e-6,1, and look at what the model sees: `sparse-fcmae inspect`"
        return Verdict(BROKEN, f"{found}: {advice}")
    if best - filled > LOST * best and best > NOTHING:
        before = f"it was {(1 - best) * nothing:.4f}" if from_weights else f"it was {_part(best)}"
        return Verdict(BROKEN, f"{words}, and {before} before: {_smaller(metrics)}")
    if collapsed := _collapsed(evaluations):
        return Verdict(BROKEN, f"{collapsed}: {_smaller(metrics)}")
    change = "" if from_weights else _progress(parts, window)
    return Verdict(LEARNING, "; ".join([words + change, *_beside(evaluations)]))


def _part(value: float) -> str:
    """A part of the whole, in percent."""
    return f"{100 * value:.0f} %"


def _smaller(metrics: Rows) -> str:
    """The advice to lower the learning rate, with a number."""
    rates = metrics.numbers("lr")
    return f"try --lr {np.nanmax(rates) / 4:.2g}" if np.isfinite(rates).any() else "lower --lr"


def _mean(parts: np.ndarray) -> float:
    """The mean of those that are finite, NaN where there are none."""
    known = parts[np.isfinite(parts)]
    return float(known.mean()) if len(known) else math.nan


def _best(parts: np.ndarray, window: int) -> float:
    """The largest mean over a window of steps."""
    known = parts[np.isfinite(parts)]
    sums = np.cumsum(np.insert(known, 0, 0.0))
    return float((sums[window:] - sums[:-window]).max() / window) if len(known) > window else _mean(known)


def _progress(parts: np.ndarray, window: int) -> str:
    """How much more is filled in than when four fifths of the steps were done, where there are enough of them."""
    step = len(parts) * 4 // 5
    gain = _mean(parts[-window:]) - _mean(parts[:step][-window:])
    if len(parts) < 5 * window or math.isnan(gain):
        return ""
    if abs(gain) <= SLOW:
        return f", as at step {step}"
    return f", {100 * abs(gain):.1f} points {'more' if gain > 0 else 'fewer'} than at step {step}"


def _collapsed(evaluations: Rows) -> str | None:
    """What has collapsed."""
    rank, distance = evaluations.last(RANK), evaluations.last(DISTANCE)
    if rank is not None and rank < ONE_DIRECTION:
        return f"all images have the same features (their effective rank is {rank:.1f})"
    if distance is not None and distance < ONE_CHANNEL:
        blocks = [name for name in evaluations.columns if name.startswith(OF_BLOCK)]
        closest = min(blocks, key=lambda name: evaluations.last(name) or math.inf, default=OF_BLOCK)
        return f"the channels of block {closest.removeprefix(OF_BLOCK)} have become one (distance {distance:.3f})"
    return None


def _beside(evaluations: Rows) -> list[str]:
    """What else there is to say of a run that learns."""
    words = []
    held_out = evaluations.numbers("val_loss")
    held_out = held_out[np.isfinite(held_out)]
    if len(held_out) > 1 and held_out[-1] > (1 + RISEN) * held_out.min():
        words.append(
            f"but on held-out images the loss has risen from {held_out.min():.4f} to {held_out[-1]:.4f}: take more "
            "images or fewer epochs"
        )
    knn = evaluations.numbers("knn_top1")
    if len(knn) > 1 and np.isfinite(knn[[0, -1]]).all():
        words.append(f"k-NN {100 * knn[-1]:.1f} %, at the start {100 * knn[0]:.1f} %")
    if (rank := evaluations.last(RANK)) is not None and (distance := evaluations.last(DISTANCE)) is not None:
        words.append(f"features have not collapsed (effective rank {rank:.0f}, channels {distance:.2f} apart)")
    return words
