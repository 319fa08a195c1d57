import pytest
import torch

from sparse_fcmae import UserError, random_mask
from sparse_fcmae.masking import VisiblePatches, kept_patches


@pytest.mark.parametrize(("grid", "ratio", "kept"), [((7, 7), 0.6, 19), ((2, 3), 0.5, 3), ((16, 16), 0.9, 25)])
def test_random_mask_keeps_the_stated_number(grid, ratio, kept):
    mask = random_mask(5, grid, ratio)
    assert mask.shape == (5, *grid)
    assert mask.dtype == torch.bool
    assert ((~mask).flatten(1).sum(1) == kept).all()


def test_random_mask_follows_its_generator():
    first, again, other = (random_mask(4, (7, 7), 0.6, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_mask_is_uniform():
    share = random_mask(4000, (4, 5), 0.6, generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert (share - 0.6).abs().max() < 0.04


@pytest.mark.parametrize(
    ("ratio", "what"), [(1.0, "keeps no patch"), (0.99, "keeps no patch"), (0.0, "masks no patch"), (60, "not a share")]
)
def test_ratio_that_leaves_nothing_to_do(ratio, what):
    with pytest.raises(UserError, match=what):
        kept_patches((7, 7), ratio)


def test_visible_patches_of_a_ragged_mask():
    mask = torch.tensor([[[0, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 1]]], dtype=torch.bool)
    visible = VisiblePatches.of(mask)
    assert visible.index.tolist() == [0, 2, 5, 12, 13, 14, 15, 16]
    assert visible.offsets.tolist() == [0, 3, 3, 8]
    assert visible.image.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert visible.slot.shape == (3, 8, 9)
    assert visible.slot[:, 3:-3, 3:-3].tolist() == [
        [[0, -1, 1], [-1, -1, 2]],
        [[-1, -1, -1], [-1, -1, -1]],
        [[3, 4, 5], [6, 7, -1]],
    ]
    assert (visible.slot == -1).sum() == visible.slot.numel() - 8


def test_patches_of_masks_that_keep_a_known_number():
    mask = random_mask(4, (5, 6), 0.6)
    for hidden, kept in ((mask, 12), (torch.zeros_like(mask), 30), (torch.ones_like(mask), 0), (mask[:0], 12)):
        known, counted = VisiblePatches.of(hidden, kept), VisiblePatches.of(hidden)
        assert all(torch.equal(getattr(known, name), getattr(counted, name)) for name in ("index", "slot", "offsets"))
        assert [t.dtype for t in (known.index, known.slot, known.offsets)] == [torch.int64, torch.int32, torch.int64]
    with pytest.raises(RuntimeError, match="not all masks keep `kept` patches"):
        VisiblePatches.of(mask, 11)
