import pytest
import torch

from sparse_fcmae import random_mask
from sparse_fcmae.backends.patch_map import PatchMap

MAPS = ("row_to_patch", "patch_to_row", "image_offsets")


def test_visible_patches_of_a_ragged_mask():
    mask = torch.tensor([[[0, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 1]]], dtype=torch.bool)
    visible = PatchMap.of(mask)
    assert visible.row_to_patch.tolist() == [0, 2, 5, 12, 13, 14, 15, 16]
    assert visible.image_offsets.tolist() == [0, 3, 3, 8]
    assert visible.coordinates[0].tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert visible.patch_to_row.shape == (3, 8, 9)
    assert visible.patch_to_row[:, 3:-3, 3:-3].tolist() == [
        [[0, -1, 1], [-1, -1, 2]],
        [[-1, -1, -1], [-1, -1, -1]],
        [[3, 4, 5], [6, 7, -1]],
    ]
    assert (visible.patch_to_row == -1).sum() == visible.patch_to_row.numel() - 8


def test_patches_of_masks_that_keep_a_known_number():
    mask = random_mask(4, (5, 6), 0.6)
    for hidden, kept in ((mask, 12), (torch.zeros_like(mask), 30), (torch.ones_like(mask), 0), (mask[:0], 12)):
        known, counted = PatchMap.of(hidden, kept), PatchMap.of(hidden)
        assert all(torch.equal(getattr(known, name), getattr(counted, name)) for name in MAPS)
        assert [getattr(known, name).dtype for name in MAPS] == [torch.int64, torch.int32, torch.int64]
    with pytest.raises(RuntimeError, match="not all masks have `num_visible` visible patches"):
        PatchMap.of(mask, 11)
