import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sparse_fcmae.data.augmentation import RandAugment
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import CentreView, RandomView, centre_crop_box, default_crop_fraction, random_crop_box

PHOTOGRAPHS = os.environ.get("SPARSE_FCMAE_IMAGES", "")  # a folder of photographs, for one more test


def test_a_view_of_an_images_own_size_is_the_image(ramp):
    for in_chans, pixels in ((3, ramp), (1, ramp[..., :1])):
        found = CentreView((30, 40), Reading(in_chans))(Image.fromarray(pixels.squeeze()))
        assert (found.shape, found.dtype) == ((30, 40, in_chans), torch.uint8)
        assert found.is_contiguous()
        assert np.array_equal(found, pixels)


def test_random_views_are_seeded_and_flipped_half_of_the_time(photograph):
    image, view = photograph(100, 80), RandomView((32, 48))
    found = [view(image, np.random.default_rng(seed)) for seed in range(60)]
    assert all((pixels.shape, pixels.dtype) == ((32, 48, 3), torch.uint8) for pixels in found)
    assert torch.equal(view(image, np.random.default_rng(7)), found[7])
    rising = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (80, 1)))
    crops = [RandomView((32, 48), Reading(1))(rising, np.random.default_rng(seed)) for seed in range(60)]
    assert 15 < sum(int(crop[0, 0] > crop[0, -1]) for crop in crops) < 45


def test_min_area_bounds_the_crop():
    rising = Image.fromarray(np.tile(np.arange(240, dtype=np.uint8), (180, 1)))
    for least, spread in ((0.2, 70), (0.9, 180)):
        view = RandomView((32, 32), Reading(1), min_area=least)
        assert min(int(np.ptp(view(rising, np.random.default_rng(seed)).numpy())) for seed in range(60)) > spread


def test_flips_can_be_left_out(photograph):
    image = photograph(100, 80)
    for seed in range(20):
        plain, rng = RandomView((32, 48))(image, np.random.default_rng(seed)), np.random.default_rng(seed)
        random_crop_box(100, 80, rng)
        kept = RandomView((32, 48), hflip=False)(image, np.random.default_rng(seed))
        assert torch.equal(kept, plain.flip(1) if rng.random() < 0.5 else plain)


def test_rotation_gives_each_of_eight_positions_alike():
    top = np.zeros((64, 64), dtype=np.uint8)  # whose eight positions differ
    top[:32, :32], top[:32, 32:] = 200, 100
    view, found = RandomView((8, 8), Reading(1), min_area=1, ratios=(1, 1), rotate=True, hflip=False), {}
    for seed in range(400):
        pixels = view(Image.fromarray(top), np.random.default_rng(seed))
        assert pixels.is_contiguous()
        corners = tuple(pixels[[1, 1, 6, 6], [1, 6, 1, 6], 0].tolist())
        found[corners] = found.get(corners, 0) + 1
    assert len(found) == 8
    assert min(found.values()) > 25


def test_rotated_crops_keep_size_and_shape(photograph):
    """A picture of squares still is one of squares after a quarter turn into a view that is not square."""
    y, x = np.mgrid[:96, :96] // 16
    board = Image.fromarray(((x + y) % 2 * 255).astype(np.uint8))
    view = RandomView((32, 64), Reading(1), min_area=0.1, ratios=(2, 2), rotate=True)
    for seed in range(30):
        pixels = view(board, np.random.default_rng(seed))[..., 0].float()
        assert pixels.shape == (32, 64)
        edges = [(pixels.diff(dim=d).abs() > 64).float().mean().item() for d in (0, 1)]
        assert edges[0] == pytest.approx(edges[1], abs=0.08)


def test_ratios_bound_the_crops():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(900, 900, rng, (0.1, 0.2), (0.5, 3)) for _ in range(500)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    assert 0.49 < (width / height).min() < 0.55
    assert 2.7 < (width / height).max() < 3.02
    assert random_crop_box(3, 1000, rng, (1, 1), (8, 8)) == (
        0,
        499,
        3,
        500,
    )  # one that fits nowhere has a pixel at least


@pytest.mark.parametrize(("suffix", "mode"), [("png", "L"), ("jpg", "L"), ("tif", "1")])
def test_the_limit_to_an_images_size_is_our_own(tmp_path, monkeypatch, suffix, mode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / f"x.{suffix}"
    Image.new(mode, (80, 50), 1).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CentreView((8, 8), Reading(1))(path).shape == (8, 8, 1)
        assert RandomView((8, 8), Reading(1, max_megapixels=0.004))(path, np.random.default_rng(0)).shape == (8, 8, 1)
    with pytest.raises(OSError, match=r"has 0.004 megapixels, more than the 0.003 of --max-megapixels"):
        CentreView((8, 8), Reading(1, max_megapixels=0.003))(path)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("in_chans", [3, 1])
def test_augmentation_is_of_the_crop_before_its_flip(photograph, in_chans):
    image, augment = photograph(100, 80), RandAugment(9)
    for seed in range(10):
        plain, rng = RandomView((32, 48), Reading(in_chans)), np.random.default_rng(seed)
        random_crop_box(100, 80, rng)
        flipped = rng.random() < 0.5
        crop = plain(image, np.random.default_rng(seed))
        crop = crop.flip(1) if flipped else crop
        expected = np.asarray(augment(Image.fromarray(crop.squeeze(-1).numpy()), rng)).reshape(32, 48, in_chans)
        found = RandomView((32, 48), Reading(in_chans), augment=augment)(image, np.random.default_rng(seed))
        assert np.array_equal(found, expected[:, ::-1] if flipped else expected)


def test_jpeg_decoded_at_a_reduced_scale_is_nearly_the_same(tmp_path):
    y, x = np.mgrid[:600, :800] / 40
    smooth = (127 + 60 * np.sin(x)[..., None] * np.cos(y)[..., None] * [1, 0.5, -1]).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "x.jpg", quality=95)
    expected = np.asarray(Image.fromarray(smooth).resize((80, 60), Image.Resampling.BICUBIC)).astype(int)
    with Image.open(tmp_path / "x.jpg") as image:
        pixels = CentreView((60, 80))(image)
        assert image.size < (800, 600)
    assert np.abs(pixels.numpy() - expected).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_scale_keeps_pixels_in_place(tmp_path, photograph, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph(477, 397).save(tmp_path / "x.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        whole = ImageOps.exif_transpose(image)
    box = centre_crop_box(*whole.size, 1)
    expected = np.asarray(whole.crop(box).resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    with Image.open(tmp_path / "x.jpg") as image:
        pixels = CentreView((24, 24))(image)
        assert max(image.size) == 60
    assert np.abs(pixels.numpy() - expected).mean() < 1.5


def differences_to_torchvision(folder, size, count):
    """Mean absolute differences, of 255, of the first crops of a folder from torchvision's of the same boxes."""
    resized_crop = pytest.importorskip("torchvision.transforms.functional").resized_crop
    mode = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    folder, view = ImageFolder(folder), RandomView((size, size))
    for index in range(min(count, len(folder))):
        with folder.open(index) as file:
            whole = Image.open(file).convert("RGB")
        rng = np.random.default_rng(index)
        (left, top, right, bottom), flip = random_crop_box(*whole.size, rng), rng.random() < 0.5
        crop = resized_crop(whole, top, left, bottom - top, right - left, [size, size], mode, antialias=True)
        expected = np.asarray(crop)[:, ::-1] if flip else np.asarray(crop)
        with folder.open(index) as file:
            pixels = view(file, np.random.default_rng(index))
        yield np.abs(pixels.numpy().astype(int) - expected).mean()


@pytest.mark.parametrize("size", [224, 40])
def test_crops_are_those_of_torchvision(tmp_path, photograph, size):
    for i in range(8):
        photograph(501, 377, i).save(tmp_path / f"{i}.jpg", quality=90)
    assert max(differences_to_torchvision(tmp_path, size, 8)) < 1.5


@pytest.mark.skipif(not PHOTOGRAPHS, reason="SPARSE_FCMAE_IMAGES names no folder of photographs")
@pytest.mark.parametrize("size", [224, 64])
def test_crops_of_photographs_are_those_of_torchvision(size):
    assert np.mean(list(differences_to_torchvision(PHOTOGRAPHS, size, 64))) < 1.5


def test_random_crops_have_the_stated_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(640, 480, rng) for _ in range(4000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    area, ratio = width * height / (640 * 480), width / height
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [640, 480]).all()
    assert 0.19 < area.min() < 0.22
    assert area.max() > 0.95
    assert 0.74 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.35
    small = np.array([np.log(ratio[area < 0.5])])
    assert abs(small.mean()) < 0.02


def test_random_crops_are_uniform():
    rng = np.random.default_rng(0)
    side, low, high = 10_000, np.log(3 / 4), np.log(4 / 3)
    boxes = np.array([random_crop_box(side, side, rng) for _ in range(8000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    fits = width * height < 0.75 * side**2  # of any ratio, so that none of these was rejected
    left, top, width, height = boxes[fits, 0], boxes[fits, 1], width[fits], height[fits]
    shares = {
        "area": (width * height / side**2 - 0.2) / 0.55,
        "ratio": (np.log(width / height) - low) / (high - low),
        "left": left / (side - width),
        "top": top / (side - height),
    }
    count = fits.sum()
    for name, values in shares.items():  # Kolmogorov and Smirnov's test, at the level 0.001
        steps, values = np.arange(count + 1) / count, np.sort(values)
        assert max((steps[1:] - values).max(), (values - steps[:-1]).max()) < 1.95 / count**0.5, name
    assert np.abs(np.corrcoef(list(shares.values())) - np.eye(4)).max() < 4 / count**0.5


def test_extreme_shapes_fall_back_to_a_centred_crop():
    rng = np.random.default_rng(0)
    assert random_crop_box(1000, 10, rng) == (493, 0, 506, 10)
    assert random_crop_box(10, 1000, rng) == (0, 493, 10, 506)
    assert random_crop_box(1, 1, rng) == (0, 0, 1, 1)


def test_centred_crops():
    assert centre_crop_box(400, 300, 1) == (50, 0, 350, 300)
    assert centre_crop_box(400, 300, 2, 0.5) == (100, 100, 300, 200)
    assert centre_crop_box(1, 100, 4) == (0, 50, 1, 51)
    assert [default_crop_fraction((side, 512)) for side in (64, 96, 224, 383, 384)] == [1, 0.875, 0.875, 0.875, 1]
