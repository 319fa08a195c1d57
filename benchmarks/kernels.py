"""Each op of the CPU's kernels, forward and backward, against plain PyTorch and against the bounds of this CPU.

An op can be no faster than it takes to read its inputs and write its results once, nor than its arithmetic takes, at
the rates of a large copy and of large matrix products in the same run. For a GPU see `gpu_kernels`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparse_fcmae import kernels as package
from sparse_fcmae import ops
from sparse_fcmae.backends import choose_dtype
from sparse_fcmae.backends.patch_map import PatchMap, flat_positions
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.benchmarks.config import KernelsConfig
from sparse_fcmae.benchmarks.engine import Candidate, Run, Turns, benchmark, take_turns
from sparse_fcmae.benchmarks.gates import OP_RESULTS, check_backends, greatest, relative
from sparse_fcmae.benchmarks.gpu_kernels import time_kernels
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import Case, move_parameters
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.model.convnext import SIZES, Block
from sparse_fcmae.ops import reference
from sparse_fcmae.ops.flops import visible_taps
from sparse_fcmae.runtime.errors import UserError

COPIED = 1 << 26  # float32 numbers
SIDE, SLOW_SIDE = 2048, 512  # rows and columns of the matrices that are multiplied
GPU_SCALE = 4  # times as much on a GPU
# per element, a multiply-add counting two; GELU_FLOPS as approximated, ERROR_FLOPS from reading to squaring
GELU_FLOPS, SLOPE_FLOPS, NORM_FLOPS, ERROR_FLOPS = 46, 4, 8, 11
PASSES = ("forward", "backward")
Rates = dict[str | torch.dtype, float]
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
    case = Case.of(config, device)
    if reason := package.unusable(device):
        raise UserError(f"there are no kernels to measure: {reason}")
    rates = measure_rates(device, dict.fromkeys((case.dtype, torch.float32)), config.rounds)
    copied, flops = rates["bytes"], rates[torch.float32]
    setting = case.setting | {"measured_bytes_per_second": copied, "measured_flops_per_second": flops}
    if device.type == "cpu":
        setting["kernels"] = package.of(device).instruction_set()
        setting["measured_matrix_flops_per_second"] = rates[case.dtype]
        rows = rows_of_ops(case, config.rounds, rates)
    elif reason := check_backends(case, "pretrain", ["native"])["native"].get("refused"):
        raise UserError(f"the kernels are not measured: {reason}")
    else:
        rows = time_kernels(case, config.rounds, copied, flops)
    yield [setting | row for row in rows]


def measure_rates(device: torch.device, dtypes: Iterable[torch.dtype], rounds: int) -> Rates:
    """ "bytes": read and written in a second by a large copy. By dtype: operations in a second of a large product."""
    scale = GPU_SCALE if device.type == "cuda" else 1
    source, target = torch.zeros(2, scale * COPIED, device=device).unbind()
    candidates = [Candidate("bytes", lambda: partial(target.copy_, source))]
    work: Rates = {"bytes": 2 * source.nbytes}
    for dtype in dtypes:
        # a product in bfloat16 takes a hundred times as long where a CPU has no instructions for it
        slow = dtype == torch.bfloat16 and choose_dtype("auto", device, "auto") != dtype
        side = scale * (SLOW_SIDE if slow else SIDE)
        square, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        candidates.append(Candidate(dtype, lambda square=square, out=out: partial(torch.mm, square, square, out=out)))
        work[dtype] = 2 * side**3
    seconds = take_turns(candidates, rounds, device).seconds
    return {name: work[name] / min(seconds[name]) for name in work}


@dataclass(frozen=True)
class Op:
    """An op on features or pixels x with parameters, against its reference.

    call: computes it of x by the functions of `ops` or of `reference`, with parameters or results in a dtype. x and
    parameters: gradients are taken of those that require them. flops: operations of the forward and of the backward
    pass beside matrix products. products: operations of the forward pass's matrix products, of which the backward pass
    has twice as many, or as many where x has no gradient. pixels: bytes that it reads of images beside x.
    """

    call: Callable[[Any, Tensor, torch.dtype], Tensor]
    dtype: torch.dtype
    x: Tensor
    parameters: list[Tensor]
    flops: tuple[float, float]
    products: float = 0
    pixels: float = 0

    def build(self, what: str, by: Any) -> Run:
        """What is timed of a pass."""
        if what == "forward":
            return partial(self.call, by, self.x, self.dtype)
        result = self.call(by, self.x, self.dtype)
        return partial(self.gradients, result, torch.randn_like(result))

    def gradients(self, result: Tensor, of_result: Tensor) -> tuple[Tensor, ...]:
        """The gradients of features and parameters, given that of the result."""
        inputs = [tensor for tensor in (self.x, *self.parameters) if tensor.requires_grad]
        return torch.autograd.grad(result, inputs, of_result.to(result.dtype), retain_graph=True)

    @cached_property
    def result(self) -> Tensor:
        """What the op computes."""
        return self.call(ops, self.x, self.dtype)

    @cached_property
    def checked(self) -> Row:
        """Columns of the greatest relative error of the result or of a gradient, against the reference in float32."""
        exact, of_result = self.call(reference, self.x.float(), torch.float32), torch.randn_like(self.result)
        pairs = zip(self.gradients(self.result, of_result), self.gradients(exact, of_result), strict=True)
        error = greatest(relative(a.float(), b.float()) for a, b in ((self.result, exact), *pairs))
        return {"error": error} | OP_RESULTS[self.dtype](error)


def ops_of(patch_map: PatchMap, side: int, channels: int, dtype: torch.dtype) -> list[Op]:
    """Every op on random features of one stage, with random parameters."""
    block, patches = move_parameters(Block(channels)), TorchPatches(patch_map.mask)
    dwconv, norm, gamma = list(block.dwconv.parameters()), list(block.norm.parameters()), block.grn.gamma
    parameters, maps = block.ten_parameters(), (patch_map.patch_to_row, patch_map.row_to_patch)

    def features(channels: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(len(patch_map.row_to_patch), side, side, channels).to(dtype).requires_grad_()

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

    x = features(channels, torch.float32)
    conv = 2 * channels * visible_taps(patch_map.mask, side)
    normed, gelu, slopes = NORM_FLOPS * x.numel(), 4 * GELU_FLOPS * x.numel(), 8 * SLOPE_FLOPS * x.numel()
    convolved, around = conv + normed, conv + normed + gelu
    return [
        Op(block_dwconv, dtype, features(channels), dwconv + norm, (convolved, 3 * convolved)),
        Op(gelu_grn, dtype, features(4 * channels), [gamma], (gelu, gelu + slopes)),
        Op(layer_norm, dtype, x, norm, (normed, 3 * normed)),
        Op(convnext_block, dtype, x, parameters, (around, 2 * around + conv), 16 * channels * x.numel()),
    ]


def ops_on_pixels(case: Case, patch_map: PatchMap) -> list[Op]:
    """The stem at the visible patches, and the loss of the masked ones, on photographs as they are stored."""
    stem, norm = (move_parameters(layer) for layer in case.encoder.downsample_layers[0])
    patch, visible = stem.weight[0].numel() * SIDES[0] ** 2, patch_map.row_to_patch
    masked = flat_positions(patch_map.mask)
    pixels, statistics = case.pixels.permute(0, 3, 1, 2), ImageFormat.imagenet().statistics(case.device)
    parameters = [*stem.parameters(), *norm.parameters()]

    def patch_embed(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return by.patch_embed(x, *parameters, visible, statistics)

    def patch_errors(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return by.patch_errors(x, pixels, masked, statistics)

    prediction = torch.randn(len(masked), patch).to(case.dtype).requires_grad_()
    embedded = len(visible) * SIDES[0] ** 2 * len(stem.weight)
    normed, read = NORM_FLOPS * embedded + 2 * len(visible) * patch, len(visible) * patch
    products = 2 * stem.weight[0].numel() * embedded
    errors = ERROR_FLOPS * prediction.numel()
    return [
        Op(patch_embed, case.dtype, pixels, parameters, (normed, 3 * normed), products, read),
        Op(patch_errors, case.dtype, prediction, [], (errors, errors), pixels=prediction.numel()),
    ]


def rows_of_ops(case: Case, rounds: int, rates: Rates) -> Iterator[Row]:
    """A row for each stage, op and pass; then for the ops on pixels."""
    patch_map, of_stages = PatchMap.of(case.masks()), zip(SIDES, SIZES[case.model][1], strict=True)
    every = [
        ({"stage": number, "features": f"{side}x{side}x{channels}"}, op)
        for number, (side, channels) in enumerate(of_stages, 1)
        for op in ops_of(patch_map, side, channels, case.dtype)
    ]
    for row, op in [*every, *(({"features": "pixels"}, op) for op in ops_on_pixels(case, patch_map))]:
        row = row | {"op": op.call.__name__}
        candidates = [
            Candidate(key, partial(op.build, *key), row | {"pass": key[0]}, gate=lambda *_, op=op: op.checked)
            for key in product(PASSES, (ops, reference))
        ]
        turns = take_turns(candidates, rounds, case.device)
        for what in PASSES:
            timed = (what, ops) in turns.seconds
            yield turns.rows[what, ops] | (figures(turns, op, what, rates) if timed else {})


def figures(turns: Turns, op: Op, what: str, rates: Rates) -> Row:
    """What follows from the time of a pass of an op.

    The forward pass reads x and writes the result. The backward pass reads x and the gradient of the result, and writes
    that of x.
    """
    backward, milliseconds = what == "backward", turns.speed((what, ops))["ms"]
    of_x = op.x.nbytes if op.x.requires_grad else 0
    twice = 2 if backward and of_x else 1
    moved = twice * of_x + op.pixels + op.result.nbytes
    products, others = twice * op.products, op.flops[backward]
    memory, arithmetic = moved / rates["bytes"], products / rates[op.dtype] + others / rates[torch.float32]
    return {
        "ms": milliseconds,
        "bytes": moved,
        "flops": products + others,
        "over_reference": turns.ratio((what, reference), (what, ops)),
        "of_bound": 1e3 * max(memory, arithmetic) / milliseconds,
        "bound": "memory" if memory > arithmetic else "arithmetic",
    }
