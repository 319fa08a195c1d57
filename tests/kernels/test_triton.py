"""The Triton kernels by the tests of the ops: on a GPU where there is one, else in Triton's interpreter."""

import json
import os
import subprocess
import sys
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path

import pytest
import test_block_dwconv as dwconv
import test_convnext_block as block
import test_gelu_grn as grn
import test_layer_norm as norm
import test_patch_embed as embed
import test_patch_errors as errors
import torch
from helpers import masks, relative_error
from pixels import DTYPES, make_pixels, make_statistics

from sparse_fcmae import create_fcmae, kernels
from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.benchmarks.gpu_kernels import time_kernels
from sparse_fcmae.benchmarks.steps import Case
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.kernels.observe import observing
from sparse_fcmae.ops import block_dwconv, convnext_block, gelu_grn, patch_embed, patch_errors
from sparse_fcmae.tasks.pretraining import PretrainingObjective

pytest.importorskip("sparse_fcmae.kernels.triton", exc_type=ImportError)
TILES = import_module("sparse_fcmae.kernels.triton.tuning").TILES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIDES = (8, 4, 2, 1)
KINDS = list(masks(2, 3))


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda device: "triton")
    monkeypatch.setattr(kernels, "unusable", lambda device: None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("poisoned")
def test_block_dwconv(side, kind):
    dwconv.compare(dwconv.make(side, 40, masks(2, 3)[kind], F32, True, DEVICE), F32)


@pytest.mark.parametrize(("dtype", "with_norm", "channels"), [(BF16, False, 7), (F16, True, 17)])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("poisoned")
def test_block_dwconv_in_half_precision(side, dtype, with_norm, channels):
    dwconv.compare(dwconv.make(side, channels, masks(2, 3)["borders"], dtype, with_norm, DEVICE), dtype)


@pytest.mark.parametrize("channels", [3, 31, 129, 320])
@pytest.mark.usefixtures("poisoned")
def test_block_dwconv_of_odd_widths(channels):
    for side in (2, 1):
        dwconv.compare(dwconv.make(side, channels, masks(3, 4)["ragged"][1:2], F32, True, DEVICE), F32)


def test_block_dwconv_without_patches_or_bias():
    inputs = dwconv.make(4, 8, torch.ones(2, 3, 3, dtype=torch.bool), norm=True, device=DEVICE)
    out, *grads = dwconv.run(block_dwconv, inputs, torch.zeros(0, 4, 4, 8, device=DEVICE))
    assert out.shape == (0, 4, 4, 8)
    assert all((g == 0).all() for g in grads)
    x, weight, _, patch_to_row, row_to_patch = dwconv.make(4, 24, masks(2, 3)["ragged"], device=DEVICE)
    bare = block_dwconv(x, weight, None, patch_to_row, row_to_patch)
    assert (
        relative_error(bare, block_dwconv(x, weight, torch.zeros_like(x[0, 0, 0]), patch_to_row, row_to_patch)) < 1e-6
    )


@pytest.mark.parametrize("kind", list(grn.OFFSETS))
@pytest.mark.parametrize("side", [8, 1])
@pytest.mark.usefixtures("poisoned")
def test_gelu_grn(side, kind):
    for dtype, channels in ((F32, 160), (BF16, 31), (F16, 129)):
        inputs = grn.make(side, channels, grn.OFFSETS[kind], dtype, DEVICE)
        grn.compare(inputs, dtype)
        grn.compare(inputs[:3], dtype)  # without beta


def test_gelu_grn_of_more_channels_than_a_program_takes():
    grn.compare(grn.make(1, 1100, grn.OFFSETS["ragged"], device=DEVICE), F32)


def test_gelu_grn_of_a_channel_that_is_zero_everywhere():
    inputs = grn.make(2, 5, grn.OFFSETS["even"], device=DEVICE)
    with torch.no_grad():
        inputs[0][..., 2] = 0
    grn.compare(inputs, F32)


def test_images_do_not_touch_each_other():
    x, gamma, offsets, beta = (t.detach() for t in grn.make(8, 40, grn.OFFSETS["ragged"], device=DEVICE))
    together = gelu_grn(x, gamma, offsets, beta)
    for first, last in pairwise(offsets.tolist()):
        alone = gelu_grn(x[first:last], gamma, torch.tensor([0, last - first], device=DEVICE), beta)
        assert torch.equal(alone, together[first:last]) or relative_error(alone, together[first:last]) < 1e-6


@pytest.mark.parametrize(("source", "result"), [(F32, F32), (F32, BF16), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize(("side", "tile"), [(8, 2), (4, 1), (2, 2), (1, 1), (4, 4)])
@pytest.mark.usefixtures("poisoned")
def test_layer_norm(side, tile, source, result):
    norm.compare(norm.make(3, side, 40, source, DEVICE), tile, result)


@pytest.mark.parametrize("channels", [3, 31, 129, 700])
@pytest.mark.usefixtures("poisoned")
def test_layer_norm_of_odd_widths(channels):
    norm.compare(norm.make(3, 2, channels, device=DEVICE), 2, F32)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [2, 1])
@pytest.mark.usefixtures("poisoned")
def test_convnext_block(side, kind, scope):
    block.compare(*block.make(side, 7, masks(2, 3)[kind], DEVICE), scope=scope, dtype=F32)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.usefixtures("poisoned")
def test_convnext_block_in_half_precision(scope):
    block.compare(*block.make(2, 40, masks(3, 5)["ragged"], DEVICE), scope=scope, dtype=BF16)


def test_convnext_block_in_chunks_of_images():
    """What `first` is for, although a GPU takes the whole batch."""
    inputs = dwconv.make(2, 24, masks(3, 4)["ragged"], norm=True)
    x, weight, bias, *maps_and_norms = (t.detach().to(DEVICE) for t in inputs)
    maps, norms = maps_and_norms[:2], maps_and_norms[2:]
    whole = block_dwconv(x, weight, bias, *maps, *norms)
    taps = weight.flatten(1).t().contiguous()
    for first, last in pairwise(PatchMap.of(masks(3, 4)["ragged"]).image_offsets.tolist()):
        part = x[first:last].contiguous()
        convolve = import_module("sparse_fcmae.kernels.triton.block_dwconv").block_dwconv
        out = convolve(part, taps, bias, *maps, torch.empty_like(part), first=first, norm=tuple(norms))
        assert relative_error(out, whole[first:last]) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_image_alone(value):
    x, module, visible = block.make(2, 24, masks(2, 3)["ragged"], DEVICE)
    with torch.no_grad():
        x[0, 0, 0, 3] = value
    ours, exact = (f(x, module, visible, torch.ones_like(x)) for f in (block.run, block.run_exactly))
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_patch_errors(dtype, channels_last):
    pixels = make_pixels(dtype, 3, 8, channels_last=channels_last, device=DEVICE)
    for normalised in (True, False):
        for precision in (F32, BF16, F16):
            errors.compare(*errors.make(pixels, 8, precision), make_statistics(pixels), normalised=normalised)


@pytest.mark.usefixtures("poisoned")
def test_patch_errors_of_patches_wider_than_a_program():
    for channels, side in ((13, 32), (1, 16)):
        pixels = make_pixels(F32, channels, side, device=DEVICE)
        errors.compare(*errors.make(pixels, side), make_statistics(pixels))
        errors.compare(*errors.make(torch.randn_like(pixels), side))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_patch_embed(dtype, channels_last):
    for channels, kernel in ((3, 4), (5, 2), (1, 1)):
        pixels = make_pixels(dtype, channels, 8 * kernel, channels_last=channels_last, device=DEVICE)
        for precision in (F32, BF16, F16):
            embed.compare(*embed.make(pixels, kernel), make_statistics(pixels), precision)


def test_patch_ops_without_patches():
    pixels = make_pixels(torch.uint8, 3, 8, device=DEVICE)
    prediction, _, rows = errors.make(pixels, 8)
    assert patch_errors(prediction[:0], pixels, rows[:0]).shape == (0,)
    _, parameters, _ = embed.make(pixels, 1)
    assert patch_embed(pixels, *parameters, rows[:0]).shape == (0, 8, 8, 40)


def test_sums_are_the_same_again():
    x, module, visible = block.make(4, 24, masks(2, 3)["ragged"], DEVICE)
    first, again = (block.run(x, module, visible, torch.ones_like(x)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_opcheck():
    ours = torch.ops.sparse_fcmae
    mask = masks(2, 3)["ragged"]
    torch.library.opcheck(ours.block_dwconv.default, dwconv.make(2, 9, mask, norm=True, device=DEVICE))
    torch.library.opcheck(ours.gelu_grn.default, grn.make(1, 9, grn.OFFSETS["empty"], device=DEVICE))
    torch.library.opcheck(ours.layer_norm.default, (*norm.make(2, 2, 9, device=DEVICE), 2, F32))
    x, module, visible = block.make(1, 9, mask, DEVICE)
    arguments = (x, list(module.parameters()), *block.maps_of(visible), F32, True)
    torch.library.opcheck(ours.convnext_block.default, arguments)


def test_every_width_leaves_tiles_to_choose_from():
    for module in ("block_dwconv", "layer_norm"):
        file = import_module(f"sparse_fcmae.kernels.triton.{module}")
        for side, width in product(SIDES, (1 << i for i in range(14))):
            choose = getattr(file, f"{module}_kernel").early_config_prune
            assert 1 <= len(choose(TILES, {}, S=side, BLOCK_C=width)) <= 5


def test_benchmark_times_every_kernel_that_a_step_launches():
    case = Case("atto", (64, 32), 0.5, 1, False, torch.device(DEVICE))
    calls = {row["kernel"]: row["calls"] for row in time_kernels(case, 1, 1e9, 1e9)}
    assert calls["block_dwconv C=160 S=2 without residual convolved"] == 6
    assert calls["layer_norm_backward C=40 S=8 TILE=2"] == 1
    assert calls["patch_windows C=3 SIDE=32 COLS=1 PATCHES=2 NORMALISES K=4"] == 2
    # of a block, in four stages and the decoder: convolutions, GRN, its norm's gradient; norms of stem and
    # downsampling, whose gradient in the stem has the shape of a block's; the stem's windows; the loss, its gradient
    assert len(calls) == 5 * (4 + 6 + 1) + 4 + 3 + 1 + 2


@pytest.mark.parametrize(("capability", "models"), [(90, ["atto", "huge"]), (80, ["base"])])
def test_kernels_compile_without_spilling_registers(capability, models):
    """For GPUs that need not be there, whichever tiles are chosen."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "ahead_of_time.py", str(capability), *models]
    result = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len({row["kernel"] for row in rows}) == 12
    assert not [row for row in rows if row["spilled"]]


COMPILE_TILES = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoGPU:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(NoGPU())
from sparse_fcmae.kernels.triton.layer_norm import layer_norm_kernel as kernel

rows, row = torch.empty(64, 40), torch.empty(40)
kernel.nargs = dict(zip(kernel.arg_names, (rows, row, row, rows, 64, 12)))
sizes = {"C": 40, "S": 8, "TILE": 1, "BLOCK_C": 64}
tiles = kernel.prune_configs({"grid": lambda tile: (1,), "warmup": False, **sizes})
print(len(tiles), len(kernel.fn.device_caches[0][0]))
"""


def test_the_tiles_of_a_new_shape_are_compiled_before_they_are_timed(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE_TILES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tiles, compiled = map(int, result.stdout.split())
    assert tiles == compiled > 1


def test_wrong_dtype():
    x, module, visible = block.make(1, 9, masks(2, 3)["ragged"], DEVICE)
    with pytest.raises(ValueError, match="kernels take float32 or bfloat16 or float16"):
        convnext_block(x.double(), list(module.parameters()), *block.maps_of(visible))


def test_no_number_that_a_kernel_is_given_is_a_float():
    """Under torch.compile too: inductor takes Python's floats for float64, in which a kernel would then compute."""
    torch.manual_seed(0)
    model = create_fcmae("2-1-1-1:8-16-24-32", image_size=64).to(DEVICE)
    objective = PretrainingObjective(model, ImageFormat.imagenet(), model.num_visible((64, 64)))
    pixels = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, device=DEVICE)
    mask = model.draw_mask(2, (64, 64), generator=torch.Generator(DEVICE).manual_seed(0))
    given, losses = {}, []

    def observe(run, kernel, grid, *arguments, **sizes):
        name = getattr(kernel, "base_fn", kernel.fn).__name__
        given.setdefault(name, set()).update(type(a) for a in (*arguments, *sizes.values()))
        doubles = [a for a in arguments if isinstance(a, torch.Tensor) and a.dtype == torch.float64]
        assert all(a.shape == (2, 3) for a in doubles), name  # the images' statistics
        run(kernel, grid, *arguments, **sizes)

    for step in (objective, torch.compile(objective, fullgraph=True, dynamic=False)):
        with observing(observe):
            loss = step(pixels, mask)
            loss.backward()
        losses.append(loss.item())
        assert len(given) > 10
        assert set().union(*given.values()) <= {torch.Tensor, torch.nn.Parameter, int, bool, type(None)}
        given.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
