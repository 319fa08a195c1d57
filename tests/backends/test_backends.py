"""What each backend makes of a mask and its features, against dense convolution in float64."""

import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import masks, relative_error
from torch import nn

from sparse_fcmae import UserError, available_backends, backends
from sparse_fcmae.backends import BACKENDS, choose_dtype, resolve_backend
from sparse_fcmae.backends.native import is_plain
from sparse_fcmae.backends.plain_torch import TorchPatches

ROWS, COLS = 3, 5
USABLE = [name for name, reason in available_backends("cpu").items() if not reason]
MASKS = masks(ROWS, COLS)


def positions(mask, side):
    """The mask of positions where a patch has side x side of them: bool [B, H, W, 1], True = visible."""
    return ~mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[..., None]


def to_dense(features, mask, side):
    """Features of any backend as [B, H, W, C], zeros where masked."""
    if features.shape[:3] == (len(mask), ROWS * side, COLS * side):
        return features * positions(mask, side)
    dense = features.new_zeros(len(mask), ROWS, COLS, side, side, features.shape[-1])
    dense[~mask] = features
    return dense.transpose(2, 3).reshape(len(mask), ROWS * side, COLS * side, -1)


def dtype_of(name):
    return torch.float32 if name == "native" else torch.float64


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", USABLE)
def test_a_patch_comes_back_to_its_place(name, mask):
    x = torch.randn(3, 4, ROWS, COLS, dtype=dtype_of(name), requires_grad=True)
    patches = BACKENDS[name](mask)
    out = patches.scatter(patches.gather(x))
    visible = ~mask[:, None]
    assert torch.equal(out, x * visible)
    out.sum().backward()
    assert torch.equal(x.grad, visible.expand_as(x).to(x.dtype))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", USABLE)
def test_stem_and_downsampling_tile_the_patches(name, mask):
    dtype, stride = dtype_of(name), 2
    conv = nn.Conv2d(3, 6, stride, stride).to(dtype)
    norm, down_norm = (nn.LayerNorm(6, eps=1e-6).to(dtype) for _ in range(2))
    down = nn.Conv2d(6, 5, 2, 2).to(dtype)
    images = torch.randn(3, 3, ROWS * 16, COLS * 16, dtype=dtype)
    patches = BACKENDS[name](mask)
    x = patches.stem(images, conv, norm)
    dense = norm(conv(images).permute(0, 2, 3, 1))
    assert relative_error(to_dense(x, mask, 8), dense * positions(mask, 8)) < 1e-5
    y = patches.downsample(x, down_norm, down)
    dense = down(down_norm(dense).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(to_dense(y, mask, 4), dense * positions(mask, 4)) < 1e-5


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("side", [4, 1])
@pytest.mark.parametrize("name", USABLE)
def test_only_the_depthwise_convolution_looks_at_visible_neighbours(name, side, mask):
    dtype = dtype_of(name)
    conv = nn.Conv2d(6, 6, 7, padding=3, groups=6).to(dtype)
    dense = torch.randn(3, ROWS * side, COLS * side, 6, dtype=dtype)
    patches = BACKENDS[name](mask)
    if name == "masked":
        x = dense
    else:
        blocks = dense.view(3, ROWS, side, COLS, side, 6).transpose(2, 3)
        x = blocks[~mask]
    visible = positions(mask, side)
    expected = F.conv2d(
        (dense * visible).permute(0, 3, 1, 2).double(), conv.weight.double(), conv.bias.double(), padding=3, groups=6
    )
    found = to_dense(patches.dwconv(x, conv), mask, side)
    assert relative_error(found, expected.permute(0, 2, 3, 1) * visible) < 1e-5


def test_a_number_of_visible_patches_that_is_wrong_is_refused():
    mask = torch.tensor([[[True, False], [False, False]]])
    assert TorchPatches(mask, 3).map.row_to_patch.tolist() == [1, 2, 3]
    with pytest.raises(RuntimeError, match="not all masks have"):
        TorchPatches(mask, 2)


def test_kernels_read_the_parameters_of_plain_layers_alone():
    assert is_plain(nn.Conv2d(2, 2, 1))
    assert is_plain(nn.LayerNorm(2, eps=1e-6))
    assert not is_plain(nn.LayerNorm(2, eps=1e-5))
    assert not is_plain(type("Own", (nn.Linear,), {})(2, 2))
    layer = nn.Linear(2, 2)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not is_plain(layer)
    handle.remove()
    assert is_plain(layer)
    layer.register_full_backward_pre_hook(lambda *_: None)
    assert not is_plain(layer)


def test_backends_that_can_not_run_say_why(monkeypatch):
    with pytest.raises(UserError, match="unknown backend 'fast'"):
        resolve_backend("fast", "cpu")
    monkeypatch.setattr(BACKENDS["native"], "unusable", staticmethod(lambda *_: "no kernels"))
    assert available_backends("cpu")["native"] == "no kernels"
    with pytest.raises(UserError, match="no kernels"):
        resolve_backend("native", "cpu", torch.float16)


def test_auto_falls_back_to_plain_pytorch_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(BACKENDS["native"], "unusable", staticmethod(lambda *_: "no kernels"))
    backends._resolve.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert resolve_backend("auto", "cpu") is TorchPatches
        assert [record.getMessage().count("no kernels") for record in caplog.records] == [1]
    finally:
        backends._resolve.cache_clear()


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
    assert marks == {name for name in vars(resolve_backend) if "constant" in name}
