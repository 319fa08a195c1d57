import pytest
import torch

from sparse_fcmae import UserError, random_mask
from sparse_fcmae.model.masking import num_visible_patches


@pytest.mark.parametrize(("grid", "ratio", "visible"), [((7, 7), 0.6, 19), ((2, 3), 0.5, 3), ((16, 16), 0.9, 25)])
def test_random_mask_keeps_the_stated_number(grid, ratio, visible):
    mask = random_mask(5, grid, ratio)
    assert mask.shape == (5, *grid)
    assert mask.dtype == torch.bool
    assert ((~mask).flatten(1).sum(1) == visible).all()


def test_random_mask_follows_its_generator():
    first, again, other = (random_mask(4, (7, 7), 0.6, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_mask_is_uniform():
    masked = random_mask(4000, (4, 5), 0.6, generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert (masked - 0.6).abs().max() < 0.04


@pytest.mark.parametrize(
    ("ratio", "what"),
    [(1.0, "keeps no patch"), (0.99, "keeps no patch"), (0.0, "masks no patch"), (60, "not a fraction")],
)
def test_ratio_that_leaves_nothing_to_do(ratio, what):
    with pytest.raises(UserError, match=what):
        num_visible_patches((7, 7), ratio)
