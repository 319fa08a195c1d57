from itertools import pairwise

import pytest
import torch
from helpers import relative_error

from sparse_fcmae.ops import gelu_grn, reference

FORWARD = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT = FORWARD | {torch.float32: 1e-4}
OFFSETS = {"even": [0, 5, 10, 15], "ragged": [0, 1, 9, 12, 15], "empty": [0, 0, 7, 7, 15, 15], "one": [0, 15]}


def make(side, channels, offsets, dtype=torch.float32, device="cpu"):
    x = (2 * torch.randn(offsets[-1], side, side, channels, device=device)).to(dtype).requires_grad_()
    gamma, beta = (torch.randn(channels, device=device).requires_grad_() for _ in range(2))
    return x, gamma, torch.tensor(offsets, device=device), beta


def run(function, inputs, probe):
    out = function(*inputs)
    differentiated = [t for t in inputs if t is not None and t.requires_grad]
    return out, *torch.autograd.grad((out * probe.to(out.dtype)).sum(), differentiated)


def run_exactly(inputs, probe):
    doubled = [t.detach().double().requires_grad_() if t is not None and t.requires_grad else t for t in inputs]
    return run(reference.gelu_grn, doubled, probe)


def compare(inputs, dtype):
    probe = torch.randn_like(inputs[0])
    ours = run(gelu_grn, inputs, probe)
    exact = run_exactly(inputs, probe)
    assert [t.dtype for t in ours] == [dtype, dtype] + [torch.float32] * (len(ours) - 2)
    for name, a, b in zip(("out", "x", "gamma", "beta"), ours, exact, strict=False):
        assert a.isfinite().all(), name
        assert relative_error(a, b) < (FORWARD if name == "out" else GRADIENT)[dtype], name


def test_reference_is_the_published_layer():
    x, gamma, offsets, beta = (t.detach() for t in make(4, 6, OFFSETS["ragged"]))
    for first, last in pairwise(offsets):
        h = torch.nn.functional.gelu(x[first:last])
        response = h.pow(2).sum((0, 1, 2), keepdim=True).sqrt()
        expected = gamma * (h * response / (response.mean(-1, keepdim=True) + 1e-6)) + beta + h
        torch.testing.assert_close(reference.gelu_grn(x, gamma, offsets, beta)[first:last], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(OFFSETS))
@pytest.mark.parametrize("side", [8, 1])
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(side, kind, dtype):
    inputs = make(side, 160, OFFSETS[kind], dtype)
    compare(inputs, dtype)
    compare(inputs[:3], dtype)  # without beta


@pytest.mark.parametrize("channels", [1, 3, 7, 16, 31, 129])
@pytest.mark.usefixtures("poisoned")
def test_odd_widths(channels):
    for dtype in (torch.float32, torch.bfloat16):
        compare(make(2, channels, OFFSETS["ragged"], dtype), dtype)


def test_gelu_alone_over_its_whole_range():
    x = torch.linspace(-14, 14, 100_003).view(1, 1, 1, -1)
    ours = gelu_grn(x, torch.zeros(x.shape[-1]), torch.tensor([0, 1]))
    exact = torch.nn.functional.gelu(x.double())
    assert (ours - exact).abs().max() < 1e-6


def test_channel_that_is_zero_everywhere_has_a_finite_gradient():
    inputs = make(2, 5, OFFSETS["even"])
    with torch.no_grad():
        inputs[0][..., 2] = 0
    compare(inputs, torch.float32)


def test_no_visible_patch_at_all():
    out, *grads = run(gelu_grn, make(2, 8, [0, 0, 0]), torch.zeros(0, 2, 2, 8))
    assert out.shape == (0, 2, 2, 8)
    assert all((g == 0).all() for g in grads)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make(2, 9, OFFSETS["empty"], dtype)
        for arguments in (inputs, inputs[:3]):
            torch.library.opcheck(torch.ops.sparse_fcmae.gelu_grn.default, arguments)


def test_images_and_threads_do_not_touch_each_other():
    x, gamma, offsets, beta = (t.detach() for t in make(8, 40, OFFSETS["ragged"]))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gelu_grn(x, gamma, offsets, beta))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for first, last in pairwise(offsets):
        alone = gelu_grn(x[first:last], gamma, torch.tensor([0, last - first]), beta)
        assert torch.equal(alone, results[0][first:last])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_go_where_the_reference_sends_them(value):
    inputs = make(2, 20, OFFSETS["ragged"])
    with torch.no_grad():
        inputs[0][4, 0, 1, 3] = value
    probe = torch.randn(inputs[0].shape)
    for ours, exact in zip(run(gelu_grn, inputs, probe), run_exactly(inputs, probe), strict=True):
        assert torch.equal(ours.isfinite(), exact.isfinite())


def test_wrong_arguments():
    x, gamma, offsets, beta = make(2, 8, OFFSETS["even"])
    wrong = {
        "float32 or bfloat16": (x.double(), gamma, offsets),
        "x must be": (x[0], gamma, offsets),
        "S one of 8, 4, 2, 1": (x.repeat(1, 2, 2, 1)[:, :3, :3], gamma, offsets),
        "gamma must be": (x, gamma[:4], offsets),
        "beta must be": (x, gamma, offsets, beta[:4]),
        "offsets must be": (x, gamma, offsets.float()),
        "ascend from 0 to 15": (x, gamma, offsets[:-1]),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            gelu_grn(*arguments)
