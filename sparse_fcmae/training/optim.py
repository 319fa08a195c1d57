"""AdamW's parameter groups and the learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def adamw(
    model: nn.Module, weight_decay: float, betas: tuple[float, float], *, capturable: bool = False
) -> torch.optim.AdamW:
    """AdamW, without decay on vectors: biases, norms, GRN's gamma and beta, the mask token.

    capturable: for CUDA graphs, which can replay the step if its rate is a tensor.
    """
    matrices, vectors = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            vector = parameter.ndim <= 1 or name.endswith((".gamma", ".beta", "mask_token"))
            (vectors if vector else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    device = matrices[0].device
    lr = torch.zeros((), device=device) if capturable else 0.0
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type in ("cpu", "cuda"), capturable=capturable)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the optimiser's moments, be they from a capturable one or not."""
    own = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def cosine_lr(step: int, steps: int, warmup: int, peak: float) -> float:
    """Rate of a step counted from 0: `warmup` equal increments up to `peak`, then half a cosine towards 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def clip(parameters: Iterable[Tensor], norm: float | None) -> None:
    """Clips the gradients' joint norm in place; None leaves them."""
    if norm is not None:
        nn.utils.clip_grad_norm_(parameters, norm)
