"""Each op of the CPU's kernels, forward and backward, against plain PyTorch and against the bounds of this CPU.

An op can be no faster than it takes to read its inputs and write its results once, nor than its arithmetic takes. Both
rates are measured in the same run: a large copy, and a large matrix product in each dtype. An op whose result or
gradients are not the reference's in float32 is refused, not reported.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae import ops
from sparse_fcmae.backends.blocks import TorchLayout
from sparse_fcmae.benchmarks.gpu_kernels import gpu_kernels
from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.benchmarks.timing import (
    OUT_OF_MEMORY,
    draw_mask,
    failing_beyond_memory,
    relative,
    take_turns,
    within_memory,
)
from sparse_fcmae.config import KernelsConfig, image_size_of, listed
from sparse_fcmae.encoder import SIZES, Block, SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.kernels import cpu
from sparse_fcmae.masking import VisiblePatches
from sparse_fcmae.ops import reference
from sparse_fcmae.training.distributed import choose_device, choose_dtype

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative Frobenius error of the result and of every gradient
GELU_FLOPS, SLOPE_FLOPS, NORM_FLOPS = 46, 4, 8  # per element, a multiply-add counting two; GELU_FLOPS as approximated
COLUMNS: Columns = {
    "op": ("op", ""),
    "features": ("features", ""),
    "pass": ("pass", ""),
    "ms": ("ms", ".2f"),
    "over_reference": ("over reference", ".2f"),
    "of_bound": ("of the bound", ".2f"),
    "bound": ("bound by", ""),
    "error": ("error", ".0e"),
}


@dataclass
class Case:
    """An op on the features of one stage; `exact` is the reference in float32.

    Bytes are those of inputs and results, forward and backward; flops come as (matrix products', other).
    """

    op: str
    ours: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    inputs: list[Tensor]
    bytes: tuple[float, float]
    flops: tuple[tuple[float, float], tuple[float, float]]


@failing_beyond_memory()
def kernels(**options: Any) -> list[Row]:
    """Prints and returns a row for each op, stage and pass; options are those of `KernelsConfig`."""
    config = KernelsConfig(**options)
    listed("model", config.model, str, SIZES)
    if (device := choose_device(config.device)).type != "cpu":
        return gpu_kernels(config, device)
    if cpu.unusable():
        raise UserError(f"there are no kernels to measure: {cpu.unusable()}")
    results = Results("kernels", config, COLUMNS, device)
    torch.manual_seed(config.seed)
    size = image_size_of(config.image_size)
    mask = draw_mask(config.batch_size, SparseEncoder("atto", image_size=size).grid(*size), config.mask_ratio)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    rates = measure_rates(dtype, config.rounds)
    setting = {k: getattr(config, k) for k in ("model", "batch_size", "image_size", "mask_ratio", "dtype")}
    setting |= {"kernels": cpu.instruction_set(), **{f"measured_{k}_per_second": rate for k, rate in rates.items()}}
    rows = []
    for stage, channels in enumerate(SIZES[config.model][1]):
        side = 8 >> stage
        place = setting | {"stage": stage + 1, "features": f"{side}x{side}x{channels}"}

        def of_stage(side: int = side, channels: int = channels) -> list[Row]:
            every = cases(VisiblePatches.of(mask), side, channels, dtype)
            tolerance = TOLERANCE[config.dtype]
            return [{"op": c.op} | row for c in every for row in measure(c, rates, tolerance, config.rounds)]

        found = within_memory(of_stage)
        rows += [place | row for row in ([{"op": "all", "refused": OUT_OF_MEMORY}] if found is None else found)]
    results.add(rows)
    return results.finish()


def measure_rates(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """What this CPU reaches with all threads: bytes copied, and flops of matrix products in `dtype` and float32."""
    source, target = torch.zeros(2, 1 << 26).unbind()
    has_bf16 = choose_dtype("auto", torch.device("cpu"), "auto") == torch.bfloat16
    # a product in bfloat16 takes a hundred times as long where the CPU has no instructions for it
    side = {torch.bfloat16: 2048 if has_bf16 else 512, torch.float32: 2048}
    square = {d: torch.randn(side[d], side[d]).to(d) for d in (dtype, torch.float32)}
    out = {d: torch.empty_like(a) for d, a in square.items()}
    runs: dict[str, Callable[[], Any]] = {"bytes": lambda: target.copy_(source)}
    runs |= {str(d): lambda d=d: torch.mm(square[d], square[d], out=out[d]) for d in square}
    best = {name: min(times) for name, times in take_turns(runs, rounds, torch.device("cpu")).items()}
    matrix, other = (2 * side[d] ** 3 / best[str(d)] for d in (dtype, torch.float32))
    return {"bytes": 2 * source.nbytes / best["bytes"], "matrix_flops": matrix, "flops": other}


def cases(visible: VisiblePatches, side: int, channels: int, dtype: torch.dtype) -> list[Case]:
    """Every op on the features of one stage."""
    slot, index, offsets = visible.slot, visible.index, visible.offsets
    shape, wide, wide_shape = (len(index), side, side, channels), 4 * channels, (len(index), side, side, 4 * channels)
    count, width = len(index) * side * side, dtype.itemsize
    ones = torch.ones(len(index), side, side, 1)
    taps = reference.block_dwconv(ones, torch.ones(1, 1, 7, 7), None, slot, index).sum().item()  # between visible ones

    block = Block(channels)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    layout, parameters = TorchLayout(visible.mask), list(block.parameters())
    half = dtype == torch.bfloat16
    x, stored, inner = torch.randn(shape), torch.randn(shape).to(dtype), torch.randn(wide_shape).to(dtype)
    x, stored, inner = (t.requires_grad_() for t in (x, stored, inner))
    dwconv = [*block.dwconv.parameters(), slot, index, *block.norm.parameters()]
    gamma, tile = block.grn.gamma, min(2, side)

    def in_blocks(whole: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return ops.convnext_block(x, parameters, slot, index, offsets) if whole else layout.block(x, block)

    def cast(t: Tensor) -> list[Tensor]:
        return [p.to(dtype) if p.is_floating_point() else p for p in t]

    conv, elements = 2 * taps * channels, count * channels
    dense = 16 * count * channels**2
    around = conv + elements * (NORM_FLOPS + 4 * GELU_FLOPS)
    return [
        Case(
            "block_dwconv",
            lambda: ops.block_dwconv(stored, *dwconv),
            lambda: reference.block_dwconv(stored, *cast(dwconv)),
            lambda: reference.block_dwconv(stored.float(), *dwconv),
            [stored, *block.dwconv.parameters(), *block.norm.parameters()],
            (2 * width * elements, 3 * width * elements),
            ((0, conv + NORM_FLOPS * elements), (0, 3 * conv + 3 * NORM_FLOPS * elements)),
        ),
        Case(
            "gelu_grn",
            lambda: ops.gelu_grn(inner, gamma.flatten(), offsets),
            lambda: reference.gelu_grn(inner, gamma.flatten(), offsets),
            lambda: reference.gelu_grn(inner.float(), gamma.flatten(), offsets),
            [inner, gamma],
            (2 * width * count * wide, 3 * width * count * wide),
            ((0, GELU_FLOPS * count * wide), (0, (GELU_FLOPS + 2 * SLOPE_FLOPS) * count * wide)),
        ),
        Case(
            "layer_norm",
            lambda: ops.layer_norm(x, *block.norm.parameters(), tile=tile, dtype=dtype),
            lambda: reference.layer_norm(x, *block.norm.parameters(), tile=tile, dtype=dtype),
            lambda: reference.layer_norm(x, *block.norm.parameters(), tile=tile),
            [x, *block.norm.parameters()],
            ((4 + width) * elements, (8 + width) * elements),
            ((0, NORM_FLOPS * elements), (0, 3 * NORM_FLOPS * elements)),
        ),
        Case(
            "convnext_block",
            lambda: in_blocks(True),
            lambda: in_blocks(False),
            lambda: layout.block(x, block),
            [x, *parameters],
            (8 * elements, 12 * elements),
            ((dense, around), (2 * dense, 2 * around + conv)),
        ),
    ]


def measure(case: Case, rates: dict[str, float], tolerance: float, rounds: int) -> list[Row]:
    """A row for the forward and one for the backward pass, or the one that says why there are none."""
    out, expected, exact = case.ours(), case.reference(), case.exact()
    probe = torch.randn_like(out)

    def backward(result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, case.inputs, probe.to(result.dtype), retain_graph=True)

    pairs = zip((out, *backward(out)), (exact, *backward(exact)), strict=True)
    error = max(relative(a.float(), b.float()) for a, b in pairs)
    if not error < tolerance:
        return [{"pass": "both", "refused": f"relative error {error:.0e}"}]
    rows = []
    runs = ({"ours": case.ours, "reference": case.reference},)
    runs += ({"ours": lambda: backward(out), "reference": lambda: backward(expected)},)
    for name, pair, size, (matrix, other) in zip(("forward", "backward"), runs, case.bytes, case.flops, strict=True):
        times = take_turns(pair, rounds, torch.device("cpu"))
        memory = size / rates["bytes"]
        arithmetic = matrix / rates["matrix_flops"] + other / rates["flops"]
        seconds = statistics.median(times["ours"])
        rows.append(
            {
                **{"pass": name, "ms": 1e3 * seconds, "bytes": size, "flops": matrix + other},
                "over_reference": statistics.median(b / a for a, b in zip(*times.values(), strict=True)),
                "of_bound": max(memory, arithmetic) / seconds,
                "bound": "memory" if memory > arithmetic else "arithmetic",
                "error": error,
            }
        )
    return rows
