import numpy as np
import pytest
import torch

from sparse_fcmae.data.format import DTYPES, FLOATS, ImageFormat, of_units
from sparse_fcmae.ops import reference


def test_normalise_as_imagenet():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    out = ImageFormat.imagenet().normalise(pixels)
    assert out.shape == (1, 3, 1, 1)
    expected = [(0 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (255 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))


def test_photographs_are_normalised_to_the_bits_they_always_were():
    mean, std = (255 * torch.tensor(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    assert torch.equal(ImageFormat.imagenet().normalise(pixels).movedim(1, -1), (pixels.float() - mean) / std)


def test_channels_other_than_colours_get_the_mean():
    assert ImageFormat.imagenet().in_units == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert ImageFormat.imagenet(2).in_units == ((pytest.approx(0.449),) * 2, (pytest.approx(0.226),) * 2)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "float16", "float32"])
def test_values_are_normalised_in_their_own_units(dtype):
    form = ImageFormat(dtype, (100.0, 5.0), (20.0, 0.5))
    values = np.random.default_rng(0).integers(-100 if dtype != "uint16" else 0, 200, (2, 4, 6, 2)).astype(dtype)
    given = torch.from_numpy(values.copy())
    out = form.normalise(given)
    expected = (values.astype(np.float64) - [100, 5]) / [20, 0.5]
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(given.numpy(), values)  # what is given is not overwritten
    np.testing.assert_allclose(form.restore(out).permute(0, 2, 3, 1).numpy(), values, rtol=1e-3, atol=1e-3)


def test_large_integers_keep_their_resolution():
    form = ImageFormat("int32", (1e9, -2e9), (10.0, 5.0))
    values = np.random.default_rng(0).integers(-30, 30, (1, 4, 6, 2)) + np.array([10**9, -2 * 10**9])
    out = form.normalise(torch.from_numpy(values.astype(np.int32)))
    assert out.dtype == torch.float32
    expected = (values - [1e9, -2e9]) / [10, 5]
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_missing_values_become_the_mean():
    form = ImageFormat("float32", (3.0,), (2.0,))
    pixels = torch.tensor([[1.0, torch.nan], [5.0, 3.0]])[None, ..., None]
    assert form.normalise(pixels).flatten().tolist() == [-1, 0, 1, 0]


@pytest.mark.parametrize("kind", DTYPES)
def test_statistics_say_the_same_as_normalising_does(kind):
    form = ImageFormat(kind, (103.3, 7.7, 50.1), (11.7, 3.3, 0.9))
    pixels = torch.randint(256, (2, 5, 6, 3)).to(getattr(torch, kind))
    if kind in FLOATS:
        pixels[0, 0, 0] = torch.tensor([torch.nan, torch.inf, 1.0])
    statistics = form.statistics(torch.device("cpu"))
    assert torch.equal(reference.normalise(pixels.permute(0, 3, 1, 2), statistics), form.normalise(pixels))


def test_json():
    form = ImageFormat("uint16", (1510.5, 380.0), (300.0, 41.0), channels=(4, 2))
    assert ImageFormat.of_json(form.as_json()) == form
    assert "channels" not in ImageFormat.imagenet().as_json()
    assert of_units((0.5,), (0.25,)) == ImageFormat("uint8", (127.5,), (63.75,))
    for wrong in ({"mean": []}, {"std": [0, 1]}, {"std": [1]}, {"dtype": "float64"}, {"mean": ["a", 1]}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            ImageFormat.of_json(form.as_json() | wrong)
