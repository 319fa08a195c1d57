from importlib import import_module

import pytest
import torch
from helpers import masks, randomise, relative_error

from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.kernels.cpu import scratch
from sparse_fcmae.kernels.cpu.convnext_block import KEEP_CHANNELS
from sparse_fcmae.model.convnext import Block
from sparse_fcmae.ops import convnext_block

MODULE = import_module("sparse_fcmae.kernels.cpu.convnext_block")
SIDES = (8, 4, 2, 1)
FORWARD = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture(params=[3 << 20, 1], ids=["one chunk", "a chunk an image"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", request.param)
    scratch._memory.buffers.clear()


def make(side, channels, mask, device="cpu"):
    """Features, and a block whose parts all matter."""
    visible = PatchMap.of(mask.to(device))
    x = torch.randn(len(visible.row_to_patch), side, side, channels, device=device, requires_grad=True)
    block = randomise(Block(channels)).to(device)
    with torch.no_grad():
        block.grn.gamma.normal_()
        block.grn.beta.normal_()
        block.dwconv.weight.normal_()
    return x, block, visible


def run(x, block, visible, probe, scope="image", dtype=torch.float32):
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        out = convnext_block(
            x, list(block.parameters()), visible.patch_to_row, visible.row_to_patch, visible.pooled(scope)
        )
    return out, *torch.autograd.grad((out * probe).sum(), (x, *block.parameters()))


def run_exactly(x, block, visible, probe, scope="image"):
    """The same in float64, from PyTorch's own operations."""
    double = Block(x.shape[3], scope).to(x.device).double()
    double.load_state_dict(block.state_dict())
    x = x.detach().double().requires_grad_()
    out = double(x, TorchPatches(visible.mask))
    return out, *torch.autograd.grad((out * probe).sum(), (x, *double.parameters()))


def compare(x, block, visible, scope="image", dtype=torch.float32):
    probe = torch.randn_like(x)
    ours, exact = run(x, block, visible, probe, scope, dtype), run_exactly(x, block, visible, probe, scope)
    assert all(t.dtype == torch.float32 for t in ours)
    for name, a, b in zip(("out", "x", *dict(block.named_parameters())), ours, exact, strict=True):
        assert a.isfinite().all(), name
        assert a.shape == b.shape, name
        assert a.is_contiguous(), name
        assert relative_error(a, b) < (FORWARD if name == "out" else GRADIENT)[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(masks(3, 5)))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("poisoned", "chunks")
def test_values_and_gradients(side, kind, dtype):
    compare(*make(side, 40, masks(3, 5)[kind]), dtype=dtype)


@pytest.mark.parametrize("channels", [3, 7, 31, KEEP_CHANNELS - 1, KEEP_CHANNELS, KEEP_CHANNELS + 5])
@pytest.mark.usefixtures("poisoned", "chunks")
def test_odd_widths(channels):
    for dtype in (torch.float32, torch.bfloat16):
        compare(*make(2, channels, masks(3, 4)["ragged"]), dtype=dtype)


@pytest.mark.usefixtures("chunks")
def test_pooling_over_the_batch():
    compare(*make(4, 24, masks(3, 4)["empty"]), scope="batch")


def test_bfloat16_features_and_parameters():
    x, block, visible = make(4, 40, masks(3, 4)["ragged"])
    probe, half = torch.randn(x.shape), block.bfloat16()
    ours = run(x.detach().bfloat16().requires_grad_(), half, visible, probe.bfloat16())
    exact = run_exactly(x.bfloat16(), half, visible, probe.bfloat16().double())
    assert all(t.dtype == torch.bfloat16 for t in ours)
    for name, a, b in zip(("out", "x", *dict(block.named_parameters())), ours, exact, strict=True):
        assert relative_error(a, b) < 3e-2, name


@pytest.mark.parametrize("channels", [8, KEEP_CHANNELS])
def test_no_visible_patch_at_all(channels):
    x, block, visible = make(4, channels, torch.ones(2, 3, 3, dtype=torch.bool))
    out, *grads = run(x, block, visible, torch.zeros(x.shape))
    assert out.shape == x.shape
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("channels", [40, KEEP_CHANNELS])
def test_what_is_kept_for_the_backward_pass(channels):
    x, block, visible = make(8, channels, masks(3, 4)["ragged"])
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        convnext_block(x, list(block.parameters()), visible.patch_to_row, visible.row_to_patch, visible.image_offsets)
    for tensor in (x, *block.parameters()):
        del kept[tensor.data_ptr()]
    inner = 2 * 4 * x.numel()  # pwconv1's output in bfloat16
    wide = [size for size in kept.values() if size >= inner // 2]
    assert wide == ([inner] if channels >= KEEP_CHANNELS else [])


def test_scratch_memory_carries_nothing_over():
    arguments = make(2, 40, masks(3, 4)["ragged"])
    probe = torch.randn(arguments[0].shape)
    first = run(*arguments, probe)
    for buffer in scratch._memory.buffers.values():
        buffer.fill_(255)  # NaN, in float32 and bfloat16
    with torch.inference_mode():
        scratch._memory.buffers.clear()
        convnext_block(arguments[0].detach(), list(arguments[1].parameters()), *maps_of(arguments[2]))
    assert all(torch.equal(a, b) for a, b in zip(first, run(*arguments, probe), strict=True))


def maps_of(visible):
    return visible.patch_to_row, visible.row_to_patch, visible.image_offsets


@pytest.mark.usefixtures("chunks")
def test_backward_is_the_forwards_precision_whatever_autocast_says_then():
    x, block, visible = make(2, 24, masks(3, 4)["ragged"])
    out = convnext_block(x, list(block.parameters()), *maps_of(visible))
    expected = torch.autograd.grad(out.sum(), (x, *block.parameters()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(out.sum(), (x, *block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.usefixtures("chunks")
def test_threads_change_rounding_at_most():
    arguments, threads, results = make(4, 40, masks(3, 5)["ragged"]), torch.get_num_threads(), []
    probe = torch.randn(arguments[0].shape)
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(run(*arguments, probe))
    torch.set_num_threads(threads)
    for single, *others in zip(*results, strict=True):
        assert all(relative_error(other, single) < GRADIENT[torch.float32] for other in others)
        assert torch.equal(others[-1], others[-2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_image_alone(value):
    x, block, visible = make(2, 24, masks(3, 4)["ragged"])
    with torch.no_grad():
        x[0, 0, 0, 3] = value
    ours, exact = (f(x, block, visible, torch.randn(x.shape)) for f in (run, run_exactly))
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
    assert ours[0][visible.coordinates[0] > 0].isfinite().all()
    assert not ours[0][visible.coordinates[0] == 0].isfinite().any()


@pytest.mark.parametrize("channels", [9, KEEP_CHANNELS])
def test_opcheck(channels):
    x, block, visible = make(2, channels, masks(2, 3)["ragged"])
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (x, list(block.parameters()), *maps_of(visible), dtype, True)
        torch.library.opcheck(torch.ops.sparse_fcmae.convnext_block.default, arguments)


@pytest.mark.parametrize("channels", [24, KEEP_CHANNELS])
def test_frozen_parameters(channels):
    x, block, visible = make(2, channels, masks(3, 4)["ragged"])
    probe = torch.randn(x.shape)
    _, grad_x, *grads = run(x, block, visible, probe)
    names = list(dict(block.named_parameters()))
    for trained in ([], ["pwconv1.weight"], ["grn.beta", "dwconv.bias"]):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in trained)
        inputs = (x, *(p for p in block.parameters() if p.requires_grad))
        ours = torch.autograd.grad(convnext_block(x, list(block.parameters()), *maps_of(visible)), inputs, probe)
        expected = (grad_x, *(g for name, g in zip(names, grads, strict=True) if name in trained))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


class Swallow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_undefined_gradient():
    x, block, visible = make(2, 24, masks(3, 4)["ragged"])
    Swallow.apply(convnext_block(x, list(block.parameters()), *maps_of(visible))).backward()
    assert x.grad is None or (x.grad == 0).all()


def test_scratch_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(scratch, "SCRATCH_BYTES", 1000)
    scratch._memory.buffers.clear()
    compare(*make(4, 24, masks(3, 4)["ragged"]), scope="batch")
    assert all(buffer.numel() <= 1000 for buffer in scratch._memory.buffers.values())


def test_wrong_arguments():
    x, block, visible = make(2, 8, masks(3, 4)["ragged"])
    parameters, where = list(block.parameters()), maps_of(visible)
    wrong = {
        "convnext_block: the cpu kernels take float32": (x.double(), parameters, *where),
        "convnext_block: the cpu kernels take": (x, [p.double() for p in parameters], *where),
        r"pwconv1_bias must be \[32\]": (x, [p[:4] if i == 5 else p for i, p in enumerate(parameters)], *where),
        r"gamma must be \[32\]": (x, [p[..., :4] if i == 6 else p for i, p in enumerate(parameters)], *where),
        "offsets must ascend": (x, parameters, *where[:2], where[2][:-1]),
        "not of one mask": (x, parameters, *where[:2], torch.tensor([0, 1, len(x)])),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            convnext_block(*arguments)
