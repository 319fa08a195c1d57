"""Counts, against PyTorch's own counter on the real modules and against masks drawn at random."""

from itertools import combinations

import pytest
import timm
import torch
from helpers import masks

from sparse_fcmae import UserError, create_classifier, create_fcmae, random_mask
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.model.flops import PUBLISHED, SIDES, count, expected_taps, module_macs
from sparse_fcmae.ops.flops import visible_taps


@pytest.mark.parametrize("name", SIZES)
def test_dense_counts_are_those_of_timms_module(name):
    with torch.device("meta"):
        model = timm.create_model(f"convnextv2_{name}")
        found = module_macs(model, torch.empty(1, 3, 224, 160))
    parts = count(name, image_size=(224, 160))
    assert parts["classifier"].dense == found
    assert parts["classifier"].parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"in_chans": 1, "stem_stride": 2}])
def test_dense_counts_are_those_of_our_modules(options):
    size, channels = (64, 96), options.get("in_chans", 3)
    parts = count("atto", image_size=size, num_classes=10, decoder_depth=2, **options)
    model = create_classifier("atto", num_classes=10, backend="masked", image_size=size, **options)
    assert parts["classifier"].dense == module_macs(model, torch.randn(1, channels, *size))
    fcmae = create_fcmae("atto", backend="masked", image_size=size, decoder_depth=2, **options)
    whole = parts["encoder"].dense + parts["decoder"].dense
    assert whole == module_macs(fcmae, torch.randn(1, channels, *size))
    assert parts["encoder"].parameters + parts["decoder"].parameters == sum(p.numel() for p in fcmae.parameters())


def test_published_figures():
    for name, sizes in PUBLISHED.items():
        for side, published in sizes.items():
            assert count(name, image_size=(side, side))["classifier"].dense / 1e9 == pytest.approx(published, rel=5e-3)


def brute_force_taps(mask, side):
    seen = (~mask).repeat_interleave(side, 1).repeat_interleave(side, 2)
    return sum(
        bool(seen[b, r + dr, c + dc])
        for b, r, c in seen.nonzero().tolist()
        for dr in range(-3, 4)
        for dc in range(-3, 4)
        if 0 <= r + dr < seen.shape[1] and 0 <= c + dc < seen.shape[2]
    ) / len(mask)


@pytest.mark.parametrize("kind", list(masks(3, 4)))
def test_taps_of_a_mask(kind):
    mask = masks(3, 4)[kind][:2]
    for side in SIDES[1:]:
        assert visible_taps(mask, side) / len(mask) == brute_force_taps(mask, side)


@pytest.mark.parametrize(("grid", "kept"), [((2, 3), 1), ((2, 3), 4), ((2, 3), 6), ((1, 1), 1), ((1, 5), 2)])
def test_expected_taps_are_the_mean_over_all_masks(grid, kept):
    places = list(combinations(range(grid[0] * grid[1]), kept))
    every = torch.ones(len(places), grid[0] * grid[1], dtype=torch.bool)
    for row, seen in zip(every, places, strict=True):
        row[list(seen)] = False
    for side in SIDES:
        assert expected_taps(grid, kept, side) == pytest.approx(visible_taps(every.view(-1, *grid), side) / len(every))


def test_sparse_counts():
    parts = count("base")
    assert parts["encoder"].sparse < 0.39 * parts["encoder"].dense
    drawn = count("base", mask=random_mask(500, (7, 7), 0.6))
    assert drawn["encoder"].sparse == pytest.approx(parts["encoder"].sparse, rel=1e-3)
    assert drawn["encoder"].dense == parts["encoder"].dense
    with pytest.raises(UserError, match="the mask is of 3x3 patches, the images of 7x7"):
        count("base", mask=torch.zeros(1, 3, 3, dtype=torch.bool))
    assert count("atto", image_size=(32, 32), mask_ratio=0)["encoder"].sparse > 0
    whole = count("base", mask_ratio=0)
    assert whole["encoder"].sparse == pytest.approx(whole["encoder"].dense, rel=0.01)  # less the taps beyond the border
    assert whole["encoder"].sparse < whole["encoder"].dense
    assert count("base", mask=torch.ones(1, 7, 7, dtype=torch.bool))["encoder"].sparse == 0
    assert sum(parts[f"stage {i}"].dense for i in range(1, 5)) + parts["stem"].dense == parts["encoder"].dense
