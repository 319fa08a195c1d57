"""The gates: what a candidate has to show before it is timed, so that nothing is fast because it is wrong."""

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.engine import Gate, Run, attempt
from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.benchmarks.steps import Case, Training, computed
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import listed
from sparse_fcmae.training.optim import set_lr
from sparse_fcmae.training.step import TrainStep

BASELINE = "masked"
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative Frobenius error, float32
ROUNDING_FACTOR = 2  # of the baseline's own bfloat16 error
LOSS_ROUNDING = 1e-3  # of the loss in bfloat16, relative, that is allowed for at least
VARIANT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of a variant against its backend
TRAINING_TOLERANCE, TRAINING_LR = 0.1, 1e-3  # relative, of how a few steps at this rate change the weights
LOSS_STEPS = 5  # within which a loss has to fall


def error_below(tolerance: float, complaint: str) -> Callable[[float], Row]:
    """The part of a gate that refuses an error which is not small. complaint: the reason, with the error as `{}`."""
    return lambda error: {} if error < tolerance else {"refused": complaint.format(error)}


# of other libraries' models with our weights: relative Frobenius error, float32
LOGITS = error_below(1e-5, "its logits differ by {:.0e}")
# mean absolute difference, of 255
PIXELS = error_below(1.5, "its pixels differ by {:.1f} of 255")
# relative Frobenius error of the result or of any gradient
OP_RESULTS = {
    torch.float32: error_below(1e-4, "relative error {:.0e}"),
    torch.bfloat16: error_below(2e-2, "relative error {:.0e}"),
}


def falling_loss(step: Run) -> Row:
    """The part of a gate that refuses a training step whose loss does not fall within a few of them."""
    losses = [loss.item() for _ in range(LOSS_STEPS) for loss in step()]
    if all(map(math.isfinite, losses)) and losses[-1] < losses[0]:
        return {}
    return {"refused": f"its loss does not fall: from {losses[0]:.4g} to {losses[-1]:.4g}"}


def same_as(backend: str, case: Case) -> Gate:
    """The gate of a backend's variant: it computes what the backend does."""
    tolerance = VARIANT_TOLERANCE["bf16" if case.bf16 else "fp32"]

    def gate(run: Run, passed: Mapping[Any, Run]) -> Row:
        if backend not in passed:
            return {"refused": f"there is no {backend} to compare it with"}
        results = [flattened(candidate()) for candidate in (run, passed[backend])]
        return {} if relative(*results) < tolerance else {"refused": "what it computes differs"}

    return gate


def another_function(backend: str) -> Gate:
    """No gate: what is known to compute something else has, as a column, how far that is from what the backend does."""

    def gate(run: Run, passed: Mapping[Any, Run]) -> Row:
        if backend not in passed:
            return {"refused": f"there is no {backend} to compare it with"}
        return {"difference": relative(*(flattened(candidate()) for candidate in (run, passed[backend])))}

    return gate


def same_training(seed: int) -> Gate:
    """The gate of a pretraining step that is launched in another way: it trains as the plain step does.

    Both take a few steps from the same weights and state of the optimiser, at a rate at which the weights change
    visibly. The weights are put back then.
    """

    def gate(run: Training, passed: Mapping[Any, Run]) -> Row:
        before = [p.detach().clone() for p in run.objective.parameters()]
        plain = replace(run, objective=deepcopy(run.objective), kind=TrainStep)
        plain.step.optimizer.load_state_dict(deepcopy(run.step.optimizer.state_dict()))
        changes = []
        for training in (run, plain):
            set_lr(training.step.optimizer, TRAINING_LR)
            torch.manual_seed(seed)
            for _ in range(LOSS_STEPS):
                training()
            changes.append(flattened(training.objective.parameters()) - flattened(before))
        set_lr(run.step.optimizer, run.lr)
        with torch.no_grad():
            for parameter, value in zip(run.objective.parameters(), before, strict=True):
                parameter.copy_(value)
        return {} if relative(*changes) < TRAINING_TOLERANCE else {"refused": "it trains differently"}

    return gate


def choose_backends(option: str, device: torch.device, dtypes: set[torch.dtype]) -> list[str]:
    """The backends that a `backend` option names. Raises UserError, with the reasons, where no dtype suits any."""
    names = list(BACKENDS) if option == "all" else listed("backend", option, str, BACKENDS)
    reasons = [BACKENDS[name].unusable(device, dtype) for name in names for dtype in dtypes]
    if all(reasons):
        raise UserError("; ".join(dict.fromkeys(reasons)))
    return names


def check_backends(case: Case, work: str, names: list[str]) -> dict[str, Row]:
    """The gate of the backends: features (of a pretraining step the loss) and gradients are those of BASELINE.

    Returns columns for each name: the errors, and as "refused" why it can't run or must not be timed.
    """
    exact = cache(partial(Exact, case, work))

    def check(name: str) -> Row:
        reason = BACKENDS[name].unusable(case.device, case.dtype)
        return {"refused": reason} if reason else exact().check(name)

    return {name: attempt(partial(check, name)) for name in names}


class Exact:
    """A model, inputs, and what BASELINE computes of them in float32."""

    def __init__(self, case: Case, work: str) -> None:
        self.case, self.work = replace(case), work  # a case of its own, so that the model is not kept
        self.model = self.case.fcmae if work == "pretrain" else self.case.encoder
        self.probe = torch.ones((), device=case.device)  # what the gradients are of: the loss, or a sum of features
        if work != "pretrain":
            self.probe = torch.randn(case.batch_size, self.model.num_features, *case.grid, device=case.device)
        self.result, self.gradients = self._values(BASELINE, bf16=False)
        self.rounding = self._errors(BASELINE, bf16=True) if case.bf16 else (0.0, 0.0)

    def check(self, backend: str) -> Row:
        """Columns of a backend's errors, and "refused" where they are too large.

        In float32 it has to be equal. In bfloat16 it may be as far from BASELINE in float32 as BASELINE in bfloat16 is,
        within a factor.
        """
        forward, gradient = self._errors(backend, bf16=False)
        passes = forward < FORWARD_TOLERANCE and gradient < GRADIENT_TOLERANCE
        if passes and self.case.bf16:
            forward, gradient = self._errors(backend, bf16=True)
            own_forward, own_gradient = self.rounding
            own_forward = max(own_forward, LOSS_ROUNDING if self.work == "pretrain" else 0)
            passes = forward <= ROUNDING_FACTOR * own_forward and gradient <= ROUNDING_FACTOR * own_gradient
        row = {"forward_error": forward, "gradient_error": gradient}
        result = "loss" if self.work == "pretrain" else "features"
        return row if passes else row | {"refused": f"{result} or gradients differ"}

    def _errors(self, backend: str, bf16: bool) -> tuple[float, float]:
        """Relative errors of a backend's result and gradients.

        The second is in float32 the greatest of any parameter, in bfloat16 that of all of them as one vector.
        """
        result, gradients = self._values(backend, bf16)
        if bf16:
            vectors = (torch.cat([g.flatten() for g in each]) for each in (gradients, self.gradients))
            return relative(result, self.result), relative(*vectors)
        pairs = zip(gradients, self.gradients, strict=True)
        return relative(result, self.result), greatest(relative(a, b) for a, b in pairs)

    def _values(self, backend: str, bf16: bool) -> tuple[Tensor, list[Tensor]]:
        self.model.zero_grad()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            result = computed(self.model.with_backend(backend), *self.case.inputs, replace(self.case, bf16=bf16))
            (result.float() * self.probe).sum().backward()
        return result.detach(), [p.grad.clone() for p in self.model.parameters()]


def flattened(tensors: Iterable[Tensor]) -> Tensor:
    """The values of tensors as one vector, float32."""
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def greatest(errors: Iterable[float]) -> float:
    """The greatest error, or NaN where one is, which Python's `max` may pass over."""
    return torch.tensor(list(errors)).max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius error of a against b."""
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
