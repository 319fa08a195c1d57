"""Which layers may be computed from their parameters alone: plain ones, that do nothing else when they are called.

Any other layer, such as one with hooks, one that an adapter wraps or one of another dilation, is called as it is.
"""

from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.utils.module_tracker import ModuleTracker

from sparse_fcmae.kernels.constants import EPS, HALO, WINDOW
from sparse_fcmae.runtime.notices import say_once

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a plain linear layer with a bias."""
    return type(layer) is nn.Linear and _is_plain(layer)


def is_norm(layer: nn.Module) -> bool:
    """Whether it is a plain LayerNorm over the channels with weight, bias and the usual epsilon."""
    return type(layer) is nn.LayerNorm and layer.eps == EPS and len(layer.normalized_shape) == 1 and _is_plain(layer)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether it is a plain depthwise 7x7 convolution with a bias, which keeps the size."""
    return (
        _is_convolution(layer, WINDOW, 1, HALO)
        and layer.groups == layer.in_channels == layer.out_channels
        and _is_plain(layer)
    )


def is_tiling(layer: nn.Module, side: int | None = None) -> bool:
    """Whether it is a plain convolution with a bias whose windows, of `side` positions if given, tile its input."""
    if type(layer) is not nn.Conv2d or side not in (None, layer.kernel_size[0]):
        return False
    side = layer.kernel_size[0]
    return _is_convolution(layer, side, side, 0) and layer.groups == 1 and _is_plain(layer)


def is_unhooked(layer: nn.Module) -> bool:
    """Whether calling it runs the forward of its type, and nothing else."""
    return "forward" not in vars(layer) and not any(getattr(layer, name) for name in HOOKS) and not _all_are_hooked()


def say_called(layer: nn.Module) -> None:
    """Says once that layers run by their own forward."""
    say_once(
        f"a layer ({type(layer).__name__}) is hooked, replaced or set otherwise than in ConvNeXt V2: such layers run "
        "by their own forward, and those around them one by one, which is slower"
    )


def _is_convolution(layer: nn.Module, side: int, stride: int, padding: int) -> bool:
    if type(layer) is not nn.Conv2d:
        return False
    found = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    return found == ((side, side), (stride, stride), (padding, padding), (1, 1), "zeros")


def _is_plain(layer: nn.Module) -> bool:
    return layer.weight is not None and layer.bias is not None and is_unhooked(layer)


def _all_are_hooked() -> bool:
    """Whether a hook of all modules sees what they compute. Those of `ModuleTracker`, by which FLOPs are counted, ask
    for names alone."""
    hooks = [hook for name in GLOBAL_HOOKS for hook in getattr(hooks_of_all, name).values()]
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


_all_are_hooked._dynamo_marked_constant = True  # torch.compile takes no notice of hooks that are added later
