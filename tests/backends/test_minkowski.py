import collections
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error
from torch import nn

from sparse_fcmae import UserError, available_backends
from sparse_fcmae.backends import choose_dtype, minkowski, resolve_backend
from sparse_fcmae.backends.masked import MaskedPatches
from sparse_fcmae.backends.minkowski import MinkowskiPatches
from sparse_fcmae.backends.plain_torch import TorchPatches

CPU = torch.device("cpu")
installed = pytest.mark.skipif(bool(available_backends("cpu")["minkowski"]), reason="MinkowskiEngine is not installed")


@pytest.fixture
def engine(monkeypatch):
    """An engine that is installed and says whether it was built for GPUs."""
    engine = SimpleNamespace(gpus=False)
    engine.is_cuda_available = lambda: engine.gpus
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(minkowski, "engine", lambda: engine)
    return engine


@pytest.mark.parametrize("gpus", [False, True])
def test_where_it_can_run(engine, gpus):
    engine.gpus = gpus
    assert MinkowskiPatches.unusable(CPU) is None
    assert MinkowskiPatches.unusable(CPU, torch.float64) is None
    on_gpu = MinkowskiPatches.unusable(torch.device("cuda"))
    assert on_gpu == (None if gpus else "this MinkowskiEngine was built without cuda")
    assert MinkowskiPatches.unusable(torch.device("mps")) == "this MinkowskiEngine was built without mps"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_computes_in_float32(engine, dtype):
    reason = MinkowskiPatches.unusable(CPU, getattr(torch, dtype))
    assert reason == f"MinkowskiEngine computes in fp32, not in {dtype}: give `dtype=fp32`"


def test_where_it_is_missing_or_broken(monkeypatch):
    def broken():
        raise OSError("libopenblas.so:\ncannot open")

    monkeypatch.setattr(minkowski, "engine", broken)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "is not installed: see docs/benchmarks.md for `make minkowski`" in MinkowskiPatches.unusable(CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert MinkowskiPatches.unusable(CPU) == "MinkowskiEngine can't be imported: libopenblas.so: cannot open"


@installed
def test_its_decoder_is_dense_and_its_dtype_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert resolve_backend("minkowski", "cpu") is MinkowskiPatches
    assert resolve_backend("minkowski", "cpu", dense=True) is MaskedPatches
    assert not MinkowskiPatches.compilable
    assert choose_dtype("auto", CPU, "minkowski") == torch.float32
    with pytest.raises(UserError, match="`backend` minkowski can't be used: MinkowskiEngine computes in fp32"):
        choose_dtype("bf16", CPU, "minkowski")


@installed
def test_the_convolutions_are_the_engines(monkeypatch):
    def refuse(*_):
        raise AssertionError("that is plain PyTorch")

    mask = torch.tensor([[[False, True], [False, False]], [[True, True], [True, False]]])
    x = torch.randn(4, 4, 4, 6)
    dwconv, conv = nn.Conv2d(6, 6, 7, padding=3, groups=6), nn.Conv2d(6, 5, 2, 2)
    other = TorchPatches(mask)
    expected = other.dwconv(x, dwconv), other.tile_conv(x, conv)
    monkeypatch.setattr(TorchPatches, "dwconv", refuse)
    monkeypatch.setattr(TorchPatches, "tile_conv", refuse)
    patches = MinkowskiPatches(mask)
    assert relative_error(patches.dwconv(x, dwconv), expected[0]) < 1e-5
    assert relative_error(patches.tile_conv(x, conv), expected[1]) < 1e-5
    assert not hasattr(collections, "Sequence")  # which the engine needs while it is imported


def test_without_a_visible_patch_the_engine_is_not_asked(monkeypatch):
    """It crashes on a list without positions."""

    def refuse():
        raise AssertionError("the engine was asked")

    monkeypatch.setattr(minkowski, "engine", refuse)
    patches = MinkowskiPatches(torch.ones(2, 1, 3, dtype=torch.bool))
    x = torch.zeros(0, 4, 4, 6)
    assert patches.dwconv(x, nn.Conv2d(6, 6, 7, padding=3, groups=6)).shape == (0, 4, 4, 6)
    assert patches.tile_conv(x, nn.Conv2d(6, 5, 2, 2)).shape == (0, 2, 2, 5)
