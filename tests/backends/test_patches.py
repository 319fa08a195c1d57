"""What every backend has in common: values and gradients of its layers by themselves, and what it runs in."""

import pytest
import torch
import torch.nn.functional as F
from helpers import masks, relative_error
from torch import nn

from sparse_fcmae import available_backends
from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.backends.patches import product_dtype
from sparse_fcmae.backends.plain_torch import TorchPatches
from sparse_fcmae.model.convnext import Block

ROWS, COLS, SIDE = 2, 3, 2
USABLE = [name for name, reason in available_backends("cpu").items() if not reason]
MASKS = masks(ROWS, COLS) | {"all": torch.ones(3, ROWS, COLS, dtype=torch.bool)}


def dtype_of(name):
    return torch.float32 if name == "native" else torch.float64


def leaf(tensor, dtype=torch.float64):
    """A copy that takes a gradient of its own."""
    return tensor.detach().clone().to(dtype).requires_grad_()


def blocks_of(dense):
    """[B, H, W, C] as patches [B, ROWS, COLS, SIDE, SIDE, C]."""
    return dense.unflatten(1, (ROWS, -1)).unflatten(3, (COLS, -1)).transpose(2, 3)


def features_of(name, dense, mask):
    """A dense tensor [B, H, W, C] as the features of a backend."""
    return dense if name == "masked" else blocks_of(dense)[~mask]


def visible_of(name, features, mask):
    """Features of a backend at the visible positions, [T, SIDE, SIDE, C]."""
    return blocks_of(features)[~mask] if name == "masked" else features


def grn_by_hand(dense, mask, gamma, beta, scope):
    """GRN of GELU at the visible positions alone, pooled by a loop over images: [T, SIDE, SIDE, C] in float64."""
    h = 0.5 * dense * (1 + torch.erf(dense / 2**0.5))
    of_images = [blocks_of(h)[i][~mask[i]] for i in range(len(mask))]
    out = []
    for part in [torch.cat(of_images)] if scope == "batch" else of_images:
        if len(part):
            response = (part**2).sum((0, 1, 2)) ** 0.5
            part = gamma * part * response / (response.mean() + 1e-6) + beta + part
        out.append(part)
    return torch.cat(out)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("name", USABLE)
def test_the_response_norm_pools_over_visible_positions_alone(name, scope, mask):
    dtype, patches = dtype_of(name), BACKENDS[name](mask)
    dense = torch.randn(3, ROWS * SIDE, COLS * SIDE, 6, dtype=torch.float64)
    gamma, beta = torch.randn(2, 6, dtype=torch.float64)
    inputs = [leaf(t, dtype) for t in (dense, gamma.view(1, 1, 1, 6), beta.view(1, 1, 1, 6))]
    exact = [leaf(t) for t in (dense, gamma, beta)]
    found = visible_of(name, patches.gelu_grn(features_of(name, inputs[0], mask), *inputs[1:], scope), mask)
    expected = grn_by_hand(exact[0], mask, *exact[1:], scope)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-5
    probe = torch.randn_like(expected)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        theirs = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert ours.grad.isfinite().all()
        assert relative_error(ours.grad.flatten(), theirs.flatten()) < 1e-5


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", USABLE)
def test_gradients_of_the_depthwise_convolution_are_those_of_a_dense_one(name, mask):
    dtype = dtype_of(name)
    conv = nn.Conv2d(6, 6, 7, padding=3, groups=6).to(dtype)
    dense = torch.randn(3, ROWS * SIDE, COLS * SIDE, 6, dtype=torch.float64)
    x, exact = leaf(dense, dtype), leaf(dense)
    found = visible_of(name, BACKENDS[name](mask).dwconv(features_of(name, x, mask), conv), mask)
    weight, bias = leaf(conv.weight), leaf(conv.bias)
    keep = ~mask.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)[..., None]
    out = F.conv2d((exact * keep).permute(0, 3, 1, 2), weight, bias, padding=3, groups=6).permute(0, 2, 3, 1)
    expected = blocks_of(out)[~mask]
    probe = torch.randn_like(expected)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for ours, theirs in ((x, exact), (conv.weight, weight), (conv.bias, bias)):
        assert relative_error(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", [name for name in USABLE if issubclass(BACKENDS[name], TorchPatches)])
def test_windows_that_tile_a_patch_are_a_convolution_of_it_with_its_gradients(name, mask):
    """Each patch by itself, as no window reaches into another one."""
    dtype = dtype_of(name)
    conv = nn.Conv2d(4, 5, 2, 2).to(dtype)
    x = torch.randn(int((~mask).sum()), SIDE, SIDE, 4, dtype=dtype, requires_grad=True)
    exact, weight, bias = (leaf(t) for t in (x, conv.weight, conv.bias))
    found = BACKENDS[name](mask).tile_conv(x, conv)
    expected = F.conv2d(exact.permute(0, 3, 1, 2), weight, bias, 2).permute(0, 2, 3, 1)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-5
    probe = torch.randn_like(expected)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for ours, theirs in ((x, exact), (conv.weight, weight), (conv.bias, bias)):
        assert relative_error(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("name", USABLE)
def test_patches_of_some_images_are_those_of_a_smaller_batch(name):
    whole = BACKENDS[name](torch.zeros(3, ROWS, COLS, dtype=torch.bool), ROWS * COLS)
    x = torch.randn(2, 4, ROWS, COLS)
    part = whole.of_images(2)
    assert type(part) is BACKENDS[name]
    assert part.mask.shape == (2, ROWS, COLS)
    assert part.num_visible == ROWS * COLS
    assert torch.equal(part.scatter(part.gather(x)), x)


def test_products_are_in_the_dtype_of_autocast_or_of_the_parameters():
    layer = nn.Linear(2, 2)
    assert product_dtype(layer) == torch.float32
    assert product_dtype(layer.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(layer) == torch.float64
        assert product_dtype(layer.float()) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert product_dtype(layer) == torch.float32


@pytest.mark.parametrize("name", [name for name in USABLE if name != "native"])
def test_other_backends_run_a_block_layer_by_layer(name):
    patches = BACKENDS[name](MASKS["none"])
    block = Block(2)
    assert not patches.fuses(block.dwconv, block.norm, block.pwconv1, block.grn, block.pwconv2)
    with pytest.raises(NotImplementedError, match=f"the backend {name} runs a block layer by layer"):
        patches.fused_block(torch.zeros(1), [], "image")


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
