"""AdamW's parameter groups, their learning rates, and the clipping of gradients."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_fcmae.runtime.errors import UserError


def adamw(
    model: nn.Module,
    weight_decay: float,
    betas: tuple[float, float],
    *,
    undecayed: tuple[str, ...] = (),
    scale: Callable[[str], float] = lambda name: 1.0,
    capturable: bool = False,
) -> torch.optim.AdamW:
    """AdamW, without decay on vectors, which are biases and LayerNorms.

    undecayed: how the names of other parameters end that take no decay. scale: of the rate, by parameter name.
    capturable: for CUDA graphs, which can replay the step if its rate is a tensor.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.endswith((".bias", *undecayed))
            groups[scale(name), free].append(parameter)
    options = [
        {"params": parameters, "weight_decay": 0.0 if free else weight_decay, "lr_scale": lr_scale}
        for (lr_scale, free), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    device = options[0]["params"][0].device
    lr = torch.zeros((), device=device) if capturable else 0.0
    return torch.optim.AdamW(options, lr=lr, betas=betas, fused=device.type in ("cpu", "cuda"), capturable=capturable)


def layout_of_moments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A parameter in the place of each tensor of its shape that AdamW's state dict has."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {"state": {i: {"exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the optimiser's moments, be they from a capturable one or not."""
    own = [{name: group[name] for name in ("lr", "capturable", "lr_scale")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise UserError(
            f"the checkpoint's optimiser is another model's or another version's: {error}; `overwrite=True` starts anew"
        ) from None
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def layer_scale(decay: float, depths: tuple[int, ...], grouped: bool) -> Callable[[str], float]:
    """Layer-wise decay of the rate: decay ** (layers between a parameter, by its official name, and the head).

    Each block is a layer, the downsampling before a stage being one with its first block; or, grouped, each of the
    first two stages, every three blocks of the third, and the last. The final norm and the head come behind the last.
    Groups count as in a model whose third stage has 27 blocks, unless it has more.
    """
    fourth = 3 + max(9, -(-depths[2] // 3))
    last = fourth + 1 if grouped else sum(depths) + 1

    def layer(name: str) -> int:
        kind, stage, block = [*name.split("."), "0"][:3]
        if kind not in ("downsample_layers", "stages"):
            return last
        stage, block = int(stage), int(block) if kind == "stages" else 0
        if not grouped:
            return sum(depths[:stage]) + block + 1
        first = (0, 2, 3, fourth)[stage] if kind == "downsample_layers" else (1, 2, 3, fourth)[stage]
        return first + block // 3 if stage == 2 else first

    return lambda name: decay ** (last - layer(name))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group, times its scale."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def clipped(parameters: Iterable[Tensor], most: float | None) -> Tensor:
    """The gradients' joint norm, a scalar on their device, after which they are clipped to `most`; None leaves them."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    norm = getattr(norm, "full_tensor", lambda: norm)()  # of sharded gradients it is known in parts
    if most is not None:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm
