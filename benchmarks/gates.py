"""The gates: what a candidate has to show before it is timed, so that nothing is fast because it is wrong."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.engine import Gate, Run
from sparse_fcmae.benchmarks.memory import OUT_OF_MEMORY, within_memory
from sparse_fcmae.benchmarks.results import Row
from sparse_fcmae.benchmarks.steps import Case, computed
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import listed

BASELINE = "masked"
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative Frobenius error, float32
ROUNDING_FACTOR = 2  # of the baseline's own bfloat16 error
LOSS_ROUNDING = 1e-3  # of the loss in bfloat16, relative, that is allowed for at least
VARIANT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "loss": 1e-2}  # relative, of a variant against its backend
LOSS_STEPS = 5  # within which a loss has to fall


def error_below(tolerance: float, complaint: str) -> Gate:
    """The gate of a `Checked` run: its error is small. complaint: what is said where it is not, with `{error}`."""
    return lambda run, passed: None if run.error < tolerance else complaint.format(error=run.error)


# of other libraries' models with our weights: relative Frobenius error, float32
LOGITS = error_below(1e-5, "its logits differ by {error:.0e}")
# mean absolute difference, of 255
PIXELS = error_below(1.5, "its pixels differ by {error:.1f} of 255")
# relative Frobenius error of the result or of any gradient
OP_RESULTS = {dtype: error_below(t, "relative error {error:.0e}") for dtype, t in (("fp32", 1e-4), ("bf16", 2e-2))}


def falling_loss(step: Run, passed: Mapping[Any, Run]) -> str | None:
    """The gate of another architecture's training step: its loss falls within a few steps."""
    losses = [step().item() for _ in range(LOSS_STEPS)]
    if all(map(math.isfinite, losses)) and losses[-1] < losses[0]:
        return None
    return f"its loss does not fall: from {losses[0]:.4g} to {losses[-1]:.4g}"


def same_as(backend: str, case: Case, work: str, seed: int) -> Gate:
    """The gate of a backend's variant: on the same masks it computes what the backend does."""
    tolerance = VARIANT_TOLERANCE["loss" if work == "pretrain" else "bf16" if case.bf16 else "fp32"]

    def gate(run: Run, passed: Mapping[Any, Run]) -> str | None:
        if backend not in passed:
            return f"there is no {backend} to compare it with"
        results = []
        for candidate in (run, passed[backend]):
            torch.manual_seed(seed)
            results.append(torch.cat([t.detach().flatten().float() for t in candidate()]))
        return None if relative(*results) < tolerance else "what it computes differs"

    return gate


def choose_backends(option: str, device: torch.device, dtypes: set[torch.dtype]) -> list[str]:
    """The backends that a `backend` option names. Raises UserError, with the reasons, where no dtype suits any."""
    names = list(BACKENDS) if option == "all" else listed("backend", option, str, BACKENDS)
    reasons = [BACKENDS[name].unusable(device, dtype) for name in names for dtype in dtypes]
    if all(reasons):
        raise UserError("; ".join(dict.fromkeys(reasons)))
    return names


def check_backends(case: Case, work: str, names: list[str]) -> tuple[dict[str, Row], dict[str, str]]:
    """The gate of the backends: features (of a pretraining step the loss) and gradients are those of BASELINE.

    Returns the errors of those that can run, as columns, and why the others can't or are refused.
    """
    reasons = {name: BACKENDS[name].unusable(case.device, case.dtype) for name in names}
    usable = [name for name, reason in reasons.items() if not reason]
    checked = within_memory(partial(_errors_of_backends, case, work, usable))
    errors, passed = checked or ({}, [])
    wrong = OUT_OF_MEMORY if checked is None else f"{'loss' if work == 'pretrain' else 'features'} or gradients differ"
    columns = {name: {"forward_error": f, "gradient_error": g} for name, (f, g) in errors.items()}
    return columns, {name: reasons[name] or wrong for name in names if name not in passed}


def _errors_of_backends(case: Case, work: str, backends: list[str]) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Errors of each backend's result and gradients, and which backends pass.

    In float32 they have to be equal. In bfloat16 they may be as far from BASELINE in float32 as BASELINE in bfloat16
    is, within a factor.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = Exact(case, work)
        errors = {name: exact.errors(name) for name in backends}
        passed = [name for name, (f, g) in errors.items() if f < FORWARD_TOLERANCE and g < GRADIENT_TOLERANCE]
        if case.bf16:
            own_forward, own_gradient = exact.errors(BASELINE, bf16=True)
            forward_limit = ROUNDING_FACTOR * max(own_forward, LOSS_ROUNDING if work == "pretrain" else 0)
            gradient_limit = ROUNDING_FACTOR * own_gradient
            rounded = {name: exact.errors(name, bf16=True) for name in passed}
            passed = [name for name, (f, g) in rounded.items() if f <= forward_limit and g <= gradient_limit]
            errors |= rounded
    return errors, passed


class Exact:
    """A model, inputs, and what BASELINE computes of them in float32."""

    def __init__(self, case: Case, work: str) -> None:
        self.case, self.model, self.inputs = case, case.model(work), case.inputs()
        self.probe = torch.ones((), device=case.device)  # what the gradients are of: the loss, or a sum of features
        if work != "pretrain":
            self.probe = torch.randn(case.batch, self.model.num_features, *case.grid, device=case.device)
        self.result, self.gradients = self._values(BASELINE, bf16=False)

    def errors(self, backend: str, bf16: bool = False) -> tuple[float, float]:
        """Relative errors of a backend's result and gradients.

        The second is in float32 the greatest of any parameter, in bfloat16 that of all of them as one vector.
        """
        result, gradients = self._values(backend, bf16)
        if bf16:
            vectors = (torch.cat([g.flatten() for g in each]) for each in (gradients, self.gradients))
            return relative(result, self.result), relative(*vectors)
        pairs = zip(gradients, self.gradients, strict=True)
        return relative(result, self.result), max(relative(a, b) for a, b in pairs)

    def _values(self, backend: str, bf16: bool) -> tuple[Tensor, list[Tensor]]:
        self.model.zero_grad()
        result = computed(self.model.with_backend(backend), *self.inputs, replace(self.case, bf16=bf16))
        (result.float() * self.probe).sum().backward()
        return result.detach(), [p.grad.clone() for p in self.model.parameters()]


def relative(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius error of a against b."""
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
