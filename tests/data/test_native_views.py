"""Windows at the images' own resolution."""

import numpy as np
import pytest
import tifffile
import torch

from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.views import CentreView, NativeView


@pytest.fixture
def scene(tmp_path):
    """The same values as .npy and as a tiled TIFF: every value says where it lies."""
    values = np.stack(np.meshgrid(np.arange(90), np.arange(120), indexing="ij"), -1).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    layout = {"tile": (16, 32), "compression": "zstd", "photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "x.tif", values, **layout)
    return values, [tmp_path / "x.npy", tmp_path / "x.tif"]


def test_windows_are_pixels_of_the_image_and_the_same_from_any_format(scene):
    values, paths = scene
    view = NativeView((24, 32), Reading(2, "float32"), hflip=False)
    corners = set()
    for seed in range(60):
        first, second = (view(path, np.random.default_rng(seed)) for path in paths)
        assert torch.equal(first, second)
        top, left = first[0, 0].int().tolist()
        assert np.array_equal(first.numpy(), values[top : top + 24, left : left + 32])
        corners.add((top, left))
    assert len(corners) > 50
    assert {top for top, _ in corners} >= {0, 66} or max(top for top, _ in corners) > 55
    centre = CentreView((24, 32), Reading(2, "float32"), native=True)(paths[1])
    assert np.array_equal(centre.numpy(), values[33:57, 44:76])


def test_windows_are_turned_all_ways(scene):
    _, paths = scene
    view, seen = NativeView((24, 32), Reading(2, "float32"), rotate=True), set()
    for seed in range(60):
        window = view(paths[0], np.random.default_rng(seed)).numpy()
        assert window.shape == (24, 32, 2)
        steps = tuple((window[1, 0] - window[0, 0]).astype(int)), tuple((window[0, 1] - window[0, 0]).astype(int))
        seen.add(steps)
        assert {abs(a) + abs(b) for a, b in steps} == {1}  # neighbours stay neighbours, at full resolution
    assert len(seen) == 8


def test_scale(scene):
    _, paths = scene
    sides = []
    for seed in range(80):
        window = NativeView((16, 16), Reading(2, "float32"), (0.5, 3), hflip=False)(
            paths[0], np.random.default_rng(seed)
        )
        assert window.shape == (16, 16, 2)
        sides.append(float(window[8, 12, 1] - window[8, 4, 1]) / 8)
    assert min(sides) == pytest.approx(0.5, abs=0.1)
    assert max(sides) == pytest.approx(3, abs=0.2)
    assert np.median(sides) == pytest.approx(1.5**0.5, abs=0.25)  # as often below as above the middle of the logarithm


def test_a_line_keeps_its_contrast_where_resizing_would_lose_it(tmp_path):
    image = np.zeros((600, 800), np.uint8)
    image[:, 400:403] = 255
    np.save(tmp_path / "x.npy", image)
    windows = [NativeView((64, 64), Reading(1))(tmp_path / "x.npy", np.random.default_rng(s)) for s in range(80)]
    shown = [window for window in windows if window.any()]
    assert shown
    assert all(set(window.unique().tolist()) <= {0, 255} for window in shown)
    assert CentreView((64, 64), Reading(1))(tmp_path / "x.npy").max() < 128


def test_windows_that_show_nothing_are_drawn_again(tmp_path):
    values = np.full((64, 256), np.nan, np.float32)
    values[:, :64] = np.random.default_rng(0).normal(0, 2, (64, 64))
    values[:, 64:128] = 5
    np.save(tmp_path / "x.npy", values)
    reading = Reading(1, "float32")

    def share(accepted, **options):
        view = NativeView((32, 32), reading, std=(2.0,), **options)
        return np.mean([accepted(view(tmp_path / "x.npy", np.random.default_rng(seed)).numpy()) for seed in range(40)])

    def valid(window):
        return np.isfinite(window).mean() >= 0.9

    def varied(window):
        return np.nanstd(window) > 1 if np.isfinite(window).any() else False

    assert share(valid) < 0.6
    assert share(valid, min_valid=0.9) >= 0.9
    assert share(varied, min_std=0.5) >= 0.9


def test_small_images_are_unreadable(scene):
    _, paths = scene
    with pytest.raises(OSError, match="has 90x120 pixels, fewer than a native window of 96x32"):
        NativeView((96, 32), Reading(2, "float32"))(paths[0], np.random.default_rng(0))
    with pytest.raises(OSError, match="has 90x120 pixels, fewer than a native window of 32x128"):
        CentreView((32, 128), Reading(2, "float32"), native=True)(paths[0])
    view = NativeView((90, 120), Reading(2, "float32"), (0.5, 4))
    assert view(paths[0], np.random.default_rng(0)).shape == (90, 120, 2)
