import pytest
import torch
from helpers import masks, randomise, relative_error
from torch import nn

from sparse_fcmae import available_backends, backends, kernels
from sparse_fcmae.backends.native import NativePatches
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.model.convnext import Block

MASK = masks(2, 3)["ragged"]
needs_kernels = pytest.mark.skipif(bool(available_backends("cpu")["native"]), reason="there are no kernels")


def hooked(layer):
    layer.register_forward_hook(lambda layer, inputs, output: output + 1)
    return layer


@needs_kernels
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(6, eps=1e-6),
        lambda: nn.LayerNorm(6, eps=0.5),
        lambda: hooked(nn.LayerNorm(6, eps=1e-6)),
        lambda: type("Half", (nn.LayerNorm,), {"forward": lambda self, x: 0.5 * x})(6, eps=1e-6),
    ],
    ids=["plain", "epsilon", "hooked", "subclass"],
)
def test_a_norm_is_run_as_it_is(norm):
    """The kernel stands in for a plain one alone; any other is called."""
    norm = randomise(norm())
    stem, down = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 5, 2, 2)
    images, patches, other = torch.randn(3, 3, 32, 48), NativePatches(MASK), TorchPatches(MASK)
    x = patches.stem(images, stem, norm)
    dense = norm(stem(images).permute(0, 2, 3, 1)).unflatten(1, (2, 8)).unflatten(3, (3, 8)).transpose(2, 3)
    assert relative_error(x, dense[~MASK]) < 1e-5
    expected = down(norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(patches.downsample(x, norm, down), expected) < 1e-5
    assert relative_error(other.downsample(x, norm, down), expected) < 1e-5


@needs_kernels
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_a_whole_block_is_its_layers_one_after_the_other(scope, monkeypatch):
    block, x = randomise(Block(8, scope)), torch.randn(int((~MASK).sum()), 4, 4, 8)
    fused = []
    real = NativePatches.fused_block
    monkeypatch.setattr(NativePatches, "fused_block", lambda self, *a: (fused.append(1), real(self, *a))[1])
    out = block(x, NativePatches(MASK))
    assert fused == [1]
    assert relative_error(out, block.double()(x.double(), TorchPatches(MASK))) < 1e-5
    block.float().pwconv1.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    changed = block(x, NativePatches(MASK))
    assert fused == [1]
    assert relative_error(changed, out) > 1e-3
    assert relative_error(changed, block(x, TorchPatches(MASK))) < 1e-5


def test_reasons_are_the_kernels(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernels, "unusable", lambda device: None)
    assert NativePatches.unusable(cpu, torch.bfloat16) is None
    assert NativePatches.unusable(cpu, torch.float64) == "the cpu kernels take float32 or bfloat16, not torch.float64"
    monkeypatch.setattr(kernels, "unusable", lambda device: "there is no compiler")
    assert NativePatches.unusable(cpu, torch.float64) == "there is no compiler"


def test_backends_are_asked_about_the_device_there_is(monkeypatch):
    monkeypatch.setattr(backends, "default_device", lambda: torch.device("mps"))
    assert available_backends()["native"] == "there are no native kernels for mps"
    assert available_backends("cpu")["torch"] is None
    assert available_backends(torch.device("cpu"))["native"] != "there are no native kernels for mps"
