"""Which evaluation of a run is its best, and when a run is no longer getting better."""

import math
from typing import Any

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.measures import is_error


class Best:
    """The best evaluation by the value that `monitor` names: the least loss, or the largest of anything else.

    measures: the names of the values that are measured. judge: tells what they are measured on. step: of the best one,
    None before there is any. value: what it was. since: how many evaluations have come after it. Raises UserError where
    the value is not measured.
    """

    def __init__(self, config: RunConfig, measures: tuple[str, ...], judge: str = "") -> None:
        self.monitor, self.patience, self.judge = config.monitor, config.patience, judge
        if self.patience and not self.monitor:
            raise UserError(f"`patience` needs `monitor`, the value that is to get better: {_choice(measures)}")
        if self.monitor and self.monitor not in measures:
            raise UserError(f"`monitor` {self.monitor} is not measured in this run: {_choice(measures)}")
        self.step: int | None = None
        self.value: float | None = None
        self.since = 0
        self.notes: list[str] = []  # what there is to say of a best that a checkpoint had

    def look(self, step: int, values: dict[str, float]) -> bool:
        """Takes an evaluation after a step; returns whether it is the best so far."""
        if not self.monitor:
            return False
        value = values[self.monitor]
        gain = self.value is None or (value < self.value if is_error(self.monitor) else value > self.value)
        better = gain and math.isfinite(value)
        if better:
            self.step, self.value, self.since = step, value, 0
        else:
            self.since += 1
        return better

    @property
    def ended(self) -> bool:
        """Whether so many evaluations have brought nothing better that the run is to stop."""
        return bool(self.patience) and self.since >= self.patience

    def why(self) -> str:
        """Why the run has ended."""
        found = f"than {self.value:.4f}" if self.value is not None else "than none, as it was never finite"
        return f"{self.since} evaluations brought no better {self.monitor} {found}: raise --patience to go on"

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        return {"by": [self.monitor, self.judge], "step": self.step, "value": self.value, "since": self.since}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave, unless that was by another value, or measured on other images."""
        if state.get("by") == [self.monitor, self.judge]:
            self.step, self.value, self.since = state["step"], state["value"], state["since"]
        elif self.monitor and state.get("step"):
            by = state["by"][0]
            how = "on other images" if by == self.monitor else f"by {by}"
            self.notes.append(f"the best so far, step {state['step']}, was found {how}, and is looked for anew")


def _choice(measures: tuple[str, ...]) -> str:
    if not measures:
        return "this run measures nothing: give `val` or `knn`, or leave it out"
    return f"choose {' or '.join(measures)}"
