import pytest
import torch
from helpers import relative_error

from sparse_fcmae.ops import layer_norm, reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FORWARD = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}
GRADIENT = FORWARD | {F32: 1e-4}


def make(blocks, side, channels, dtype=F32, device="cpu"):
    x = (3 * torch.randn(blocks, side, side, channels, device=device) + 2).to(dtype)
    return [t.requires_grad_() for t in (x, *torch.randn(2, channels, device=device))]


def run(function, inputs, probe, **options):
    out = function(*inputs, **options)
    return out, *torch.autograd.grad((out.double() * probe).sum(), inputs)


def compare(inputs, tile, dtype):
    out = layer_norm(*inputs, tile=tile, dtype=dtype)
    probe = torch.randn_like(out).double()
    ours = run(layer_norm, inputs, probe, tile=tile, dtype=dtype)
    exact = run(reference.layer_norm, [t.detach().double().requires_grad_() for t in inputs], probe, tile=tile)
    assert [t.dtype for t in ours] == [dtype, inputs[0].dtype, F32, F32]
    loosest = max((inputs[0].dtype, dtype), key=FORWARD.get)
    for name, a, b in zip(("out", "x", "weight", "bias"), ours, exact, strict=True):
        assert a.isfinite().all(), name
        assert relative_error(a, b) < (FORWARD if name == "out" else GRADIENT)[loosest], name


def test_reference_puts_each_window_in_a_row():
    x = torch.randn(2, 4, 4, 5)
    out = reference.layer_norm(x, torch.ones(5), torch.zeros(5), tile=2)
    norm = torch.nn.functional.layer_norm(x, (5,), eps=1e-6)
    assert torch.equal(out[1, 1, 0], torch.cat([norm[1, 2, 0], norm[1, 2, 1], norm[1, 3, 0], norm[1, 3, 1]]))


@pytest.mark.parametrize(("source", "result"), [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize(("side", "tile"), [(8, 1), (8, 2), (4, 2), (2, 2), (1, 1), (4, 4)])
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(side, tile, source, result):
    compare(make(7, side, 40, source), tile, result)


@pytest.mark.parametrize("channels", [3, 7, 16, 31, 129, 700])
@pytest.mark.usefixtures("poisoned")
def test_odd_widths(channels):
    for dtype in (F32, BF16):
        compare(make(3, 2, channels, dtype), 2, dtype)


def test_nothing_at_all():
    out, *grads = run(layer_norm, make(0, 2, 8), torch.zeros(0, 1, 1, 32), tile=2)
    assert out.shape == (0, 1, 1, 32)
    assert all((g == 0).all() for g in grads)


def test_opcheck():
    for dtype in (F32, BF16):
        torch.library.opcheck(torch.ops.sparse_fcmae.layer_norm.default, (*make(2, 4, 9), 2, dtype))


def test_threads_change_rounding_at_most():
    inputs, probe = make(50, 4, 40), torch.randn(50, 2, 2, 160).double()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(run(layer_norm, inputs, probe, tile=2))
    torch.set_num_threads(threads)
    for single, *others in zip(*results, strict=True):
        assert all(relative_error(other, single) < GRADIENT[F32] for other in others)
        assert torch.equal(others[-1], others[-2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_go_where_the_reference_sends_them(value):
    inputs, probe = make(3, 2, 20), torch.randn(3, 1, 1, 80).double()
    with torch.no_grad():
        inputs[0][1, 0, 1, 3] = value
    exact = run(reference.layer_norm, [t.detach().double().requires_grad_() for t in inputs], probe, tile=2)
    for a, b in zip(run(layer_norm, inputs, probe, tile=2), exact, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_wrong_arguments():
    x, weight, bias = make(2, 4, 8)
    wrong = {
        "float32 or bfloat16": (x.double(), weight, bias, 1, F32),
        "multiple of the tile": (x, weight, bias, 3, F32),
        r"weight must be \[8\]": (x, weight[:4], bias, 1, F32),
    }
    for message, (x, weight, bias, tile, dtype) in wrong.items():
        with pytest.raises(ValueError, match=message):
            layer_norm(x, weight, bias, tile=tile, dtype=dtype)
