"""What is under way around a call: autocast, transforms of `torch.func`, differentiation in forward mode."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def product_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of matrix products with a parameter: autocast's where that is on, else the parameter's own.

    float64 stays float64, as autocast leaves it alone. There is no autocast on the meta device.
    """
    device, dtype = parameter.device.type, parameter.dtype
    if dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def transformed() -> bool:
    """Whether tensors may be ones of a transform of `torch.func`, such as `vmap` and `jvp`, or carry a tangent."""
    return forward_ad._current_level >= 0 or _stacked()


def _stacked() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


_stacked._dynamo_marked_constant = True  # torch.compile guards the stack of transforms, but can't look at it
