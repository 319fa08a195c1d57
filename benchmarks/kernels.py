"""Each op of the CPU's kernels, forward and backward, against plain PyTorch and against the bounds of this CPU.

An op can be no faster than it takes to read its inputs and write its results once, nor than its arithmetic takes, at
the rates of a large copy and of large matrix products in the same run. For a GPU see `gpu_kernels`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_fcmae import kernels as package
from sparse_fcmae import ops
from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.benchmarks import gpu_kernels
from sparse_fcmae.benchmarks.config import KernelsConfig
from sparse_fcmae.benchmarks.engine import Candidate, Checked, Turns, benchmark, take_turns
from sparse_fcmae.benchmarks.gates import OP_RESULTS, relative
from sparse_fcmae.benchmarks.rates import Rates, measure_rates
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import Case, move_parameters, setting_of
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.model.convnext import SIZES, Block
from sparse_fcmae.ops import reference
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import listed

GELU_FLOPS, SLOPE_FLOPS, NORM_FLOPS = 46, 4, 8  # per element, a multiply-add counting two; GELU_FLOPS as approximated
COLUMNS: Columns = {
    "op": ("op", ""),  # on a CPU
    "features": ("features", ""),
    "pass": ("pass", ""),
    "kernel": ("kernel", ""),  # on a GPU
    "calls": ("calls", "d"),
    "ms": ("ms", ".3f"),
    "over_reference": ("over reference", ".2f"),
    "of_bound": ("of the bound", ".2f"),
    "bound": ("bound by", ""),
    "error": ("error", ".0e"),
    "gb_per_second": ("GB/s", ".0f"),
    "of_copy": ("of a copy", ".2f"),
    "tflop_per_second": ("TFLOP/s", ".1f"),
    "of_product": ("of a float32 product", ".2f"),
}


@benchmark("kernels", KernelsConfig, COLUMNS)
def kernels(config: KernelsConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns a row for each op, stage and pass, or on a GPU for each Triton kernel and shape."""
    listed("model", config.model, str, SIZES)
    if reason := package.unusable(device):
        raise UserError(f"there are no kernels to measure: {reason}")
    case = Case.of(config, device)
    yield list(rows_of_ops(config, case) if device.type == "cpu" else gpu_kernels.rows(config, case))


class Cost(NamedTuple):
    """Of a pass: bytes of inputs and results, operations of matrix products, all other operations."""

    bytes: float
    products: float
    others: float


@dataclass(frozen=True)
class Op:
    """An op on features x with parameters, against its reference.

    call: computes it of x by the functions of `ops` or of `reference`, with parameters or results in a dtype.
    """

    name: str
    call: Callable[[Any, Tensor, torch.dtype], Tensor]
    dtype: torch.dtype
    x: Tensor
    parameters: list[Tensor]
    costs: dict[str, Cost]

    @cached_property
    def results(self) -> dict[Any, Tensor]:
        """What the op and its reference compute."""
        return {by: self.call(by, self.x, self.dtype) for by in (ops, reference)}

    @cached_property
    def probe(self) -> Tensor:
        """A gradient of the result."""
        return torch.randn_like(self.results[ops])

    def gradients(self, result: Tensor) -> tuple[Tensor, ...]:
        """The gradients of features and parameters."""
        inputs, probe = [self.x, *self.parameters], self.probe.to(result.dtype)
        return torch.autograd.grad(result, inputs, probe, retain_graph=True)

    @cached_property
    def error(self) -> float:
        """The greatest relative error of the result or of a gradient, against the reference in float32."""
        exact = self.call(reference, self.x.float(), torch.float32)
        found, expected = ((result, *self.gradients(result)) for result in (self.results[ops], exact))
        return max(relative(a.float(), b.float()) for a, b in zip(found, expected, strict=True))

    def run_of(self, what: str, by: Any) -> Checked:
        """What is timed of a pass."""
        forward = partial(self.call, by, self.x, self.dtype)
        run = forward if what == "forward" else partial(self.gradients, self.results[by])
        return Checked(run, self.error, {"error": self.error})


def ops_of(patch_map: PatchMap, side: int, channels: int, dtype: torch.dtype) -> list[Op]:
    """Every op on random features of one stage, with random parameters."""
    block, patches = move_parameters(Block(channels)), TorchPatches(patch_map.mask)
    dwconv, norm, gamma = list(block.dwconv.parameters()), list(block.norm.parameters()), block.grn.gamma
    parameters, maps = block.ten_parameters(), (patch_map.patch_to_row, patch_map.row_to_patch)

    def features(channels: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(len(patch_map.row_to_patch), side, side, channels).to(dtype).requires_grad_()

    def op(call: Callable, x: Tensor, parameters: list[Tensor], forward: Cost, backward: Cost) -> Op:
        return Op(call.__name__, call, dtype, x, parameters, {"forward": forward, "backward": backward})

    def block_dwconv(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        cast = (lambda p: p) if by is ops else (lambda p: p.to(dtype))  # the op casts by itself
        return by.block_dwconv(x, *map(cast, dwconv), *maps, *map(cast, norm))

    def gelu_grn(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return by.gelu_grn(x, gamma.flatten(), patch_map.image_offsets)

    def layer_norm(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return by.layer_norm(x, *norm, tile=min(2, side), dtype=dtype)

    def convnext_block(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return by.convnext_block(x, parameters, *maps, patch_map.image_offsets) if by is ops else block(x, patches)

    x, b = features(channels, torch.float32), dtype.itemsize
    n = x.numel()
    taps = reference.block_dwconv(torch.ones_like(x[..., :1]), torch.ones(1, 1, 7, 7), None, *maps).sum().item()
    conv, normed, products = 2 * taps * channels, NORM_FLOPS * n, 16 * n * channels
    gelu, slopes, around = 4 * GELU_FLOPS * n, 8 * SLOPE_FLOPS * n, conv + normed + 4 * GELU_FLOPS * n
    convolved = Cost(2 * b * n, 0, conv + normed), Cost(3 * b * n, 0, 3 * (conv + normed))
    whole = Cost(8 * n, products, around), Cost(12 * n, 2 * products, 2 * around + conv)
    return [
        op(block_dwconv, features(channels), dwconv + norm, *convolved),
        op(gelu_grn, features(4 * channels), [gamma], Cost(8 * b * n, 0, gelu), Cost(12 * b * n, 0, gelu + slopes)),
        op(layer_norm, x, norm, Cost((4 + b) * n, 0, normed), Cost((8 + b) * n, 0, 3 * normed)),
        op(convnext_block, x, parameters, *whole),
    ]


def rows_of_ops(config: KernelsConfig, case: Case) -> Iterator[Row]:
    """A row for each stage, op and pass."""
    rates = measure_rates(case.device, (case.dtype, torch.float32), config.rounds)
    place = setting_of(config) | {
        "kernels": package.of(case.device).instruction_set(),
        "measured_bytes_per_second": rates["bytes"],
        "measured_matrix_flops_per_second": rates[case.dtype],
        "measured_flops_per_second": rates[torch.float32],
    }
    patch_map = PatchMap.of(case.masks())
    for number, (side, channels) in enumerate(zip(SIDES, SIZES[config.model][1], strict=True), 1):
        at_stage = place | {"stage": number, "features": f"{side}x{side}x{channels}"}
        for op in ops_of(patch_map, side, channels, case.dtype):
            candidates = [
                Candidate(
                    (what, by),
                    partial(op.run_of, what, by),
                    at_stage | {"op": op.name, "pass": what},
                    gate=OP_RESULTS[config.dtype],
                )
                for what, by in product(op.costs, (ops, reference))
            ]
            turns = take_turns(candidates, config.rounds, case.device)
            yield from (figures(turns, what, cost, rates, case.dtype) for what, cost in op.costs.items())


def figures(turns: Turns, what: str, cost: Cost, rates: Rates, dtype: torch.dtype) -> Row:
    """The row of a pass of an op, with what follows from the times."""
    row, ours = turns.rows[what, ops], (what, ops)
    if ours not in turns.seconds:
        return row
    memory = cost.bytes / rates["bytes"]
    arithmetic = cost.products / rates[dtype] + cost.others / rates[torch.float32]
    milliseconds = turns.speed(ours)["ms"]
    return row | {
        "ms": milliseconds,
        "bytes": cost.bytes,
        "flops": cost.products + cost.others,
        "over_reference": turns.ratio((what, reference), ours),
        "of_bound": 1e3 * max(memory, arithmetic) / milliseconds,
        "bound": "memory" if memory > arithmetic else "arithmetic",
    }
