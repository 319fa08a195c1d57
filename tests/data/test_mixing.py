import pytest
import torch

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.mixing import Mixing


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_shares_labels_as_it_shares_pixels(mixup, cutmix):
    """Plain images, one of each class: their mean gives away the shares."""
    labels = torch.arange(8)
    pixels = (labels * 20).to(torch.uint8)[:, None, None, None].expand(8, 16, 24, 3)
    mix = Mixing(8, ImageFormat.imagenet(), random_erasing=0, mixup=mixup, cutmix=cutmix)
    for _ in range(5):
        images, targets = mix(pixels, labels)
        shares = targets @ ImageFormat.imagenet().normalise(pixels)[:, 0, 0, 0]
        torch.testing.assert_close(images[:, 0].mean((1, 2)), shares, atol=1e-5, rtol=1e-5)
        assert ((targets > 0).sum(1) <= 2).all()


def test_erasing_puts_noise_into_boxes():
    for channels in (3, 1):
        form = ImageFormat.imagenet(channels)
        mix = Mixing(3, form, random_erasing=0.5, mixup=0, cutmix=0)
        pixels = torch.full((60, 32, 48, channels), 77, dtype=torch.uint8)
        labels = torch.arange(60) % 3
        torch.manual_seed(1)
        images, same = mix(pixels, labels)
        torch.manual_seed(1)
        assert torch.equal(mix(pixels, labels)[0], images)
        assert same is labels
        changed = (images != form.normalise(pixels)).any(1).flatten(1).float().mean(1)
        assert 0.3 < (changed > 0).float().mean() < 0.7
        assert changed[changed > 0].min() > 0.01
        assert changed.max() < 0.4
        noise = images[images != form.normalise(pixels)]
        assert noise.std() == pytest.approx(1, abs=0.1)
    plain, _ = Mixing(3, form, random_erasing=0, mixup=0, cutmix=0)(pixels, labels)
    assert torch.equal(plain, form.normalise(pixels))
