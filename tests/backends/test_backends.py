"""Which backend runs, in which dtype, and what is said where it can't."""

import logging

import pytest
import torch

from sparse_fcmae import UserError, available_backends, backends
from sparse_fcmae.backends import BACKENDS, choose_dtype, resolve_backend
from sparse_fcmae.backends.plain_torch import TorchPatches


def test_backends_that_can_not_run_say_why(monkeypatch):
    with pytest.raises(UserError, match="unknown backend 'fast'"):
        resolve_backend("fast", "cpu")
    monkeypatch.setattr(BACKENDS["native"], "unusable", staticmethod(lambda *_: "no kernels"))
    assert available_backends("cpu")["native"] == "no kernels"
    with pytest.raises(UserError, match="no kernels"):
        resolve_backend("native", "cpu", torch.float16)


def test_auto_falls_back_to_plain_pytorch_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(BACKENDS["native"], "unusable", staticmethod(lambda *_: "no kernels"))
    backends._usable.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert resolve_backend("auto", "cpu") is TorchPatches
        assert [record.getMessage().count("no kernels") for record in caplog.records] == [1]
    finally:
        backends._usable.cache_clear()


def test_the_decoder_of_a_backend_without_dense_layers_is_dense():
    assert resolve_backend("torch", "cpu", dense=True) is TorchPatches
    assert BACKENDS["minkowski"].dense_backend == "masked"


def test_dtypes_that_a_backend_computes_in():
    cpu = torch.device("cpu")
    assert choose_dtype("fp32", cpu, "torch") == torch.float32
    assert choose_dtype("bf16", cpu, "masked") == torch.bfloat16
    assert choose_dtype("auto", cpu, "torch") in (torch.float32, torch.bfloat16)


def test_the_mark_of_constants_is_the_one_that_the_compiler_sets():
    """It is set by hand, as asking the compiler for it would import the compiler."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    marks = {name for name in vars(marked) if "constant" in name}
    assert marks == {name for name in vars(backends._resolve) if "constant" in name}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype("auto", torch.device("cpu"), "torch") == expected
    assert choose_dtype("fp32", torch.device("cpu"), "torch") == torch.float32
    assert choose_dtype("bf16", torch.device("cpu"), "torch") == torch.bfloat16
    assert choose_dtype("auto", torch.device("mps"), "torch") == torch.float32


def test_a_cpu_of_which_torch_knows_nothing_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_dtype("auto", torch.device("cpu"), "torch") == torch.float32


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_where_it_does_not_emulate_it(monkeypatch, supported, expected):
    def is_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not supported}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert choose_dtype("auto", torch.device("cuda"), "torch") == expected


def test_a_backend_without_bfloat16_computes_in_float32_unless_it_is_asked_not_to(monkeypatch):
    def unusable(device, dtype=torch.float32):
        return None if dtype == torch.float32 else "this one takes float32"

    monkeypatch.setattr(TorchPatches, "unusable", staticmethod(unusable))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    backends._usable.cache_clear()
    try:
        assert choose_dtype("auto", torch.device("cpu"), "torch") == torch.float32
        with pytest.raises(UserError, match="`backend` torch can't be used: this one takes float32"):
            choose_dtype("bf16", torch.device("cpu"), "torch")
    finally:
        backends._usable.cache_clear()
