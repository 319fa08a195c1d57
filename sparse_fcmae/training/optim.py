"""AdamW's parameter groups and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, without decay on 1-d parameters: biases, norms, GRN's gamma and beta, the mask token."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = [max(p.shape) == p.numel() for p in parameters]
    groups = [
        {"params": [p for p, f in zip(parameters, flat, strict=True) if not f], "weight_decay": weight_decay},
        {"params": [p for p, f in zip(parameters, flat, strict=True) if f], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=parameters[0].device.type in ("cpu", "cuda"))


def cosine_lr(step: int, steps: int, warmup: int, peak: float) -> float:
    """Rate of a step counted from 0: `warmup` equal increments up to `peak`, then half a cosine towards 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(parameters: Iterable[Tensor], norm: float | None) -> None:
    """Clips the gradients' joint norm in place; None leaves them."""
    if norm is not None:
        nn.utils.clip_grad_norm_(parameters, norm)
