"""Which dtype "auto" is on a device."""

import pytest
import torch

from sparse_fcmae import UserError, backends
from sparse_fcmae.backends import choose_dtype
from sparse_fcmae.backends.plain_torch import TorchPatches


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
    backends._resolve.cache_clear()
    try:
        assert choose_dtype("auto", torch.device("cpu"), "torch") == torch.float32
        with pytest.raises(UserError, match="`backend` torch can't be used: this one takes float32"):
            choose_dtype("bf16", torch.device("cpu"), "torch")
    finally:
        backends._resolve.cache_clear()
