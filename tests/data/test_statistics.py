import pytest
import torch

from sparse_fcmae.data.statistics import IMAGENET_MEAN, IMAGENET_STD, channel_stats, normalise


def test_normalise():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    out = normalise(pixels)
    assert out.shape == (1, 3, 1, 1)
    expected = [(0 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (255 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))


def test_channels_other_than_colours_get_the_mean():
    assert channel_stats(3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert channel_stats(2) == ((pytest.approx(0.449),) * 2, (pytest.approx(0.226),) * 2)
