import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, rand_bbox
from timm.data.random_erasing import RandomErasing

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.mixing import Mixing
from sparse_fcmae.runtime import notices


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


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0)])
@pytest.mark.parametrize("batch", [2, 3, 7])
def test_no_image_is_mixed_with_itself(batch, mixup, cutmix):
    labels = torch.arange(batch)
    pixels = torch.zeros(batch, 16, 24, 3, dtype=torch.uint8)
    mix = Mixing(batch, ImageFormat.imagenet(), random_erasing=0, mixup=mixup, cutmix=cutmix)
    partners = set()
    for _ in range(200):
        _, targets = mix(pixels, labels)
        assert torch.allclose(targets.sum(1), torch.ones(batch))
        assert torch.allclose(targets.diagonal(), targets[0, 0].expand(batch))
        partners |= set((targets * (1 - torch.eye(batch))).nonzero()[:, 1].tolist())
    assert partners == set(range(batch))


def test_an_image_that_is_alone_is_not_mixed_and_that_is_said(caplog):
    notices._say.cache_clear()
    mix = Mixing(3, ImageFormat.imagenet(), random_erasing=0, mixup=0.8, cutmix=1.0)
    pixels, labels = torch.randint(256, (1, 16, 24, 3), dtype=torch.uint8), torch.tensor([2])
    images, targets = mix(pixels, labels)
    assert torch.equal(images, ImageFormat.imagenet().normalise(pixels))
    assert targets is labels
    mix(pixels, labels)
    assert [record.getMessage() for record in caplog.records] == [
        "sparse-fcmae: a micro-batch of one image has no other one to mix it with: it is not mixed"
    ]


def covered(draws, own):
    """Of each pixel how often it is another image's, and quantiles of an image's own share of pixels."""
    shares = np.sort([mask.mean() for mask in own])
    return 1 - np.mean(own, 0), shares[np.linspace(0, draws - 1, 21).astype(int)]


def test_boxes_of_cutmix_are_those_of_timm():
    """In large images 1 - E[(r - r^2 / 4)^2] = 0.68 of an image is its own on average, with r^2 uniform."""
    np.random.seed(0)
    for height, width, draws in ((9, 14, 6000), (60, 80, 6000)):
        mix = Mixing(2, ImageFormat("float32", (0.0,), (1.0,)), random_erasing=0, mixup=0, cutmix=1.0)
        pixels, theirs, ours, labelled = torch.zeros(2, height, width, 1), [], [], []
        pixels[1] = 1
        for _ in range(draws):
            top, bottom, left, right = rand_bbox((height, width), np.random.beta(1.0, 1.0))
            theirs.append(np.ones((height, width)))
            theirs[-1][top:bottom, left:right] = 0
            images, targets = mix(pixels, torch.arange(2))
            ours.append(1 - images[0, 0].numpy())
            labelled.append(targets[0, 0].item())
        assert np.allclose(labelled, [mask.mean() for mask in ours], atol=1e-6)
        (where, shares), (their_where, their_shares) = covered(draws, ours), covered(draws, theirs)
        assert np.abs(where - their_where).max() < 0.04
        assert np.abs(shares - their_shares).max() < 0.05
        if height == 60:
            assert np.mean(labelled) == pytest.approx(1 - (1 / 2 - 1 / 5 + 1 / 48), abs=0.015)


def test_shares_of_mixup_are_those_of_timm():
    np.random.seed(0)
    mix = Mixing(2, ImageFormat.imagenet(), random_erasing=0, mixup=0.8, cutmix=0)
    pixels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    ours = np.sort([mix(pixels, torch.arange(2))[1][0, 0].item() for _ in range(4000)])
    timms = Mixup(mixup_alpha=0.8, num_classes=2)
    theirs = np.sort([timms._params_per_batch()[0] for _ in range(4000)])
    assert np.abs(ours - theirs).max() < 0.05


def erased(draws, height, width, erase):
    """Shares of pixels, heights over widths, and how often each pixel is hit, of the boxes of many images."""
    boxes = [erase() for _ in range(draws)]
    sizes = np.array([(box.any(1).sum(), box.any(0).sum()) for box in boxes])
    return np.sort(sizes.prod(1) / (height * width)), np.sort(np.log(sizes[:, 0] / sizes[:, 1])), np.mean(boxes, 0)


def test_boxes_of_random_erasing_are_those_of_timm():
    height, width, draws = 48, 64, 3000
    timms = RandomErasing(1.0, max_area=1 / 3, mode="const", device="cpu")
    ours = Mixing(2, ImageFormat("float32", (0.0,), (1.0,)), random_erasing=1.0, mixup=0, cutmix=0)
    image = torch.full((1, height, width, 1), 7.0)
    found = erased(draws, height, width, lambda: (ours(image, torch.zeros(1))[0][0, 0] != 7).numpy())
    expected = erased(draws, height, width, lambda: (timms(torch.ones(1, height, width)) == 0)[0].numpy())
    for a, b, tolerance in zip(found, expected, (0.03, 0.3, 0.05), strict=True):
        assert np.abs(a - b).max() < tolerance


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
