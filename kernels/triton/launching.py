"""Launches Triton kernels on the device of their tensors, and divides work among programs."""

from typing import Any

import torch
import triton

from sparse_fcmae.kernels import observe


def launch(kernel: Any, grid: Any, *arguments: Any, **sizes: int) -> None:
    """Launches a kernel on the device of its first argument, which need not be the current one.

    Tuned kernels get as their last argument the magnitude of this argument, by which their tiles are chosen too.
    """
    observe.call(_run, kernel, grid, *arguments, **sizes)


def _run(kernel: Any, grid: Any, *arguments: Any, **sizes: int) -> None:
    device = arguments[0].device
    if isinstance(kernel, triton.runtime.Autotuner):
        arguments = (*arguments, arguments[0].numel().bit_length())
    if device.type == "cpu":  # interpreted
        kernel[grid](*arguments, **sizes)
        return
    with torch.get_device_module(device).device(device):
        kernel[grid](*arguments, **sizes)


def portions(items: int, least: int, programs: int) -> tuple[int, int]:
    """How many programs divide the items among them, at most `programs`, and how many each takes, `least` or more."""
    per_program = max(least, triton.cdiv(items, max(1, programs)))
    return triton.cdiv(items, per_program), per_program
