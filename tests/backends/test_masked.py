import pytest
import torch
import torch.nn.functional as F
from helpers import masks, relative_error
from torch import nn

from sparse_fcmae.backends.masked import MaskedPatches

MASKS = masks(2, 3)


def positions(mask, side):
    return mask.repeat_interleave(side, 1).repeat_interleave(side, 2)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_what_stands_at_masked_positions_is_never_read(mask):
    """Whatever it is, the visible positions of every layer have the same values."""
    conv, norm = nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6, eps=1e-6)
    dwconv = nn.Conv2d(6, 6, 7, padding=3, groups=6)
    gamma, beta = torch.randn(2, 1, 1, 1, 6)
    hidden, patches = positions(mask, 8), MaskedPatches(mask)
    images, x = torch.randn(3, 3, 32, 48), torch.randn(3, 16, 24, 6)
    poisoned = x.masked_fill(hidden[..., None], torch.nan)
    calls = (
        lambda images, x: patches.stem(images, conv, norm),
        lambda images, x: patches.dwconv(x, dwconv),
        lambda images, x: patches.gelu_grn(x, gamma, beta, "image"),
        lambda images, x: patches.gelu_grn(x, gamma, beta, "batch"),
    )
    wrong = images.masked_fill(positions(mask, 16)[:, None], torch.nan)
    for call in calls:
        assert torch.equal(call(wrong, poisoned)[~hidden], call(images, x)[~hidden])
    last = torch.randn(3, 6, 2, 3)
    scattered = patches.scatter(last.masked_fill(mask[:, None], torch.nan).permute(0, 2, 3, 1))
    assert torch.equal(scattered, last * ~mask[:, None])
    assert torch.equal(patches.gather(last.masked_fill(mask[:, None], torch.nan)).permute(0, 3, 1, 2), scattered)


def test_where_nothing_is_masked_it_is_dense_convolution():
    mask, conv = torch.zeros(2, 2, 3, dtype=torch.bool), nn.Conv2d(6, 6, 7, padding=3, groups=6)
    x = torch.randn(2, 8, 12, 6)
    expected = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=3, groups=6).permute(0, 2, 3, 1)
    for patches, nothing in ((MaskedPatches(mask, 6), True), (MaskedPatches(mask), False)):
        assert patches.masks_nothing is nothing  # what is not known to be empty is multiplied in
        assert relative_error(patches.dwconv(x, conv), expected) < 1e-6
        assert bool(patches.masks) is not nothing


@pytest.mark.parametrize("num_visible", [None, 4])
def test_a_known_number_of_visible_patches_is_not_taken_for_all(num_visible):
    mask = torch.tensor([[[True, False, False], [False, False, True]]])
    x = torch.randn(1, 5, 2, 3)
    patches = MaskedPatches(mask, num_visible)
    assert not patches.masks_nothing
    assert torch.equal(patches.scatter(patches.gather(x)), x * ~mask[:, None])
