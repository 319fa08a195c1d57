"""Matrix products on the CPU, each way alike."""

import pytest
import test_convnext_block as block
import torch
from helpers import masks, relative_error

from sparse_fcmae import UserError
from sparse_fcmae.kernels.cpu import products
from sparse_fcmae.runtime import choices

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(params=[*products.WAYS, "measured"])
def _way(request, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_made", {})
    if request.param == "measured":
        monkeypatch.delenv(products.VARIABLE)
    else:
        monkeypatch.setenv(products.VARIABLE, request.param)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(300, 40, 160), (1, 3, 7), (100, 1, 5), (64, 7, 1), (33, 48, 40)]
)
@pytest.mark.usefixtures("_way", "poisoned")
def test_products(rows, inputs, outputs, dtype):
    x, weight, grad = (torch.randn(*s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    bias, total = torch.randn(outputs).to(dtype), torch.randn(outputs, inputs)
    found = {
        "linear": (products.linear(x, weight, grad.new_empty(grad.shape)), x.double() @ weight.double().t()),
        "with bias": (
            products.linear(x, weight, grad.new_empty(grad.shape), bias),
            x.double() @ weight.double().t() + bias.double(),
        ),
        "input": (products.linear_input_gradient(grad, weight, x.new_empty(x.shape)), grad.double() @ weight.double()),
        "weight": (products.add_weight_gradient(None, grad, x), grad.double().t() @ x.double()),
        "sum": (
            products.add_weight_gradient(total.clone(), grad, x),
            total.double() + grad.double().t() @ x.double(),
        ),
    }
    for name, (ours, exact) in found.items():
        assert ours.dtype == (F32 if name in ("weight", "sum") else dtype), name
        assert ours.shape == exact.shape, name
        assert ours.is_contiguous(), name
        assert relative_error(ours, exact) < (1e-5 if dtype == F32 else 1e-2), name


@pytest.mark.usefixtures("_way")
def test_no_rows():
    x, weight = torch.zeros(0, 3), torch.randn(5, 3)
    assert products.linear(x, weight, torch.empty(0, 5)).shape == (0, 5)
    assert products.linear_input_gradient(torch.zeros(0, 5), weight, x).shape == (0, 3)
    assert (products.add_weight_gradient(None, torch.zeros(0, 5), x) == 0).all()


@pytest.mark.parametrize("channels", [40, 100])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.usefixtures("_way", "poisoned")
def test_a_block(channels, dtype):
    for side, kind in ((4, "ragged"), (1, "empty")):
        block.compare(*block.make(side, channels, masks(2, 3)[kind]), dtype=dtype)


def test_measuring_leaves_what_is_given_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_made", {})
    monkeypatch.delenv(products.VARIABLE)
    grad, x, total = torch.randn(50, 4), torch.randn(50, 6), torch.randn(4, 6)
    expected = total + grad.t() @ x
    torch.testing.assert_close(products.add_weight_gradient(total, grad, x), expected)
    assert list(choices.made()) == ["weight gradient 64x6x4 float32"]


def test_autocast_is_not_heeded(monkeypatch):
    x, weight, grad = torch.randn(40, 20), torch.randn(30, 20), torch.randn(40, 30)
    for way in products.WAYS:
        monkeypatch.setenv(products.VARIABLE, way)
        with torch.autocast("cpu", BF16):
            assert products.linear(x, weight, torch.empty(40, 30)).dtype == F32
            assert products.linear_input_gradient(grad, weight, torch.empty(40, 20)).dtype == F32
            assert products.add_weight_gradient(None, grad, x).dtype == F32


def test_an_unknown_way_is_refused(monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "blas")
    with pytest.raises(UserError, match="SPARSE_FCMAE_PRODUCTS is blas: choose one of mm, onednn"):
        products.linear(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
