import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from sparse_fcmae.kernels.cpu import products
from sparse_fcmae.ops import linear

BF16, F32 = torch.bfloat16, torch.float32
TOLERANCE = {F32: 1e-5, BF16: 1e-2}


@pytest.fixture(params=products.WAYS, autouse=True)
def _way(request, monkeypatch):
    monkeypatch.setenv(products.VARIABLE, request.param)


def make(*shape, outputs=7, dtype=F32):
    x, weight, bias = torch.randn(*shape), torch.randn(outputs, shape[-1]), torch.randn(outputs)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def run(function, inputs, probe, bf16=False):
    with torch.autocast("cpu", BF16, enabled=bf16):
        out = function(*inputs)
    return out, *torch.autograd.grad((out.double() * probe).sum(), inputs)


@pytest.mark.parametrize(("dtype", "bf16"), [(F32, False), (F32, True), (BF16, False)])
@pytest.mark.parametrize("shape", [(50, 8), (3, 4, 4, 5), (1, 1), (2, 1, 3)])
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(shape, dtype, bf16):
    inputs, probe = make(*shape, dtype=dtype), torch.randn(*shape[:-1], 7, dtype=torch.float64)
    exact = run(F.linear, [t.detach().double().requires_grad_() for t in inputs], probe)
    ours, theirs = (run(function, inputs, probe, bf16) for function in (linear, F.linear))
    for a, b, plain in zip(ours, exact, theirs, strict=True):
        assert a.dtype == plain.dtype
        assert relative_error(a, b) < TOLERANCE[BF16 if bf16 else dtype]


def test_features_that_do_not_lie_side_by_side():
    x, _, bias = make(6, 10)
    probe = torch.randn(5, 7, dtype=torch.float64)
    inputs = (x.t()[:5, :], torch.randn(6, 7).t().requires_grad_(), bias)
    for a, b in zip(run(linear, inputs, probe), run(F.linear, inputs, probe), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_no_gradient_is_computed_that_nobody_wants(frozen, monkeypatch):
    x, weight, bias = make(20, 3)
    for tensor in (x,) if frozen == "x" else (weight, bias):
        tensor.requires_grad_(False)
    unwanted = "linear_input_gradient" if frozen == "x" else "add_weight_gradient"
    monkeypatch.setattr(products, unwanted, None)
    linear(x, weight, bias).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (bias.grad is None) == (frozen == "parameters")


def test_no_rows_at_all():
    inputs = make(0, 4)
    out, *grads = run(linear, inputs, torch.zeros(0, 7))
    assert out.shape == (0, 7)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.sparse_fcmae.linear.default, make(3, 2, 5, dtype=dtype))


def test_wrong_arguments():
    x, weight, bias = make(4, 5)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        linear(x.double(), weight.double(), bias.double())
    with pytest.raises(ValueError, match=r"weight \[7, 5\] and bias \[7\] are not for x \[4, 3\]"):
        linear(x[:, :3], weight, bias)
