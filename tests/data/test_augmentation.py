import random

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, AugmentOp, rand_augment_transform

from sparse_fcmae.data.augmentation import FILL, OPERATIONS, RandAugment

GREYS = np.tile(np.arange(256, dtype=np.uint8), (256, 1))


def operated(name, m, pixels=GREYS):
    image = Image.fromarray(np.stack([pixels] * 3, -1))
    return np.asarray(OPERATIONS[name][0](image, m)).astype(int)[..., 0]


def test_operations_of_rand_augment_at_the_recipes_magnitude():
    """Against what each does to a value by definition, at magnitude 9 of 10."""
    x = GREYS.astype(int)
    assert np.array_equal(operated("invert", 0.9), 255 - x)
    assert np.array_equal(operated("posterize", 0.9), x & 0x80)
    assert np.array_equal(operated("solarize", 0.9), np.where(x >= 26, 255 - x, x))
    assert np.array_equal(operated("solarize_add", 0.9), np.where(x < 128, np.minimum(255, x + 99), x))
    assert np.abs(operated("brightness", 0.9) - np.minimum(255, x * 1.81)).max() <= 1
    assert np.abs(operated("brightness", -0.9) - x * 0.19).max() <= 1
    assert np.abs(operated("contrast", -0.9) - (128 + (x - 128) * 0.19)).max() <= 1
    assert np.array_equal(operated("color", 0.9), x)
    half = GREYS // 2 + 20
    assert np.abs(operated("auto_contrast", 0.9, half) - (half.astype(int) - 20) * 255 / 127).max() <= 1
    assert np.abs(operated("equalize", 0.9) - x).max() <= 2
    assert (
        np.array_equal(operated("translate_x", 0.9)[:, : 256 - 104], x[:, 104:])
        or np.abs(operated("translate_x", 0.9)[:, :150] - x[:, 104:254]).max() <= 1
    )
    down = operated("translate_y", -0.9, GREYS.T.copy())
    assert np.abs(down[106:, :] - GREYS.T.astype(int)[:150]).max() <= 4
    centre = operated("rotate", 0.9)[128]
    assert np.abs(np.diff(centre[60:196].astype(float)).mean() - np.cos(np.deg2rad(27))) < 0.02
    sheared = operated("shear_x", 0.9)
    assert sheared[100, 100] == pytest.approx(100 + 0.27 * 100, abs=2)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_timm(name):
    """Pixel for pixel, with the recipe's bicubic interpolation."""
    theirs = "".join(part.title() for part in name.split("_"))
    theirs = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}.get(theirs, theirs)
    if name in ("posterize", "solarize", "color", "contrast", "brightness", "sharpness"):
        theirs += "Increasing"
    assert theirs in _RAND_INCREASING_TRANSFORMS
    assert len(_RAND_INCREASING_TRANSFORMS) == len(OPERATIONS)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8))
    image = image.resize((99, 120), Image.Resampling.BICUBIC)
    operation, signed = OPERATIONS[name]
    options = {"interpolation": Image.Resampling.BICUBIC, "img_mean": FILL}
    for magnitude in (0.0, 4.5, 9.0, 10.0):
        ours = [np.asarray(operation(image, sign * magnitude / 10)) for sign in ((1, -1) if signed else (1,))]
        for _ in range(20):
            expected = np.asarray(AugmentOp(theirs, prob=1.0, magnitude=magnitude, hparams=options)(image))
            assert any(np.array_equal(expected, found) for found in ours), magnitude


def test_rand_augment_draws_as_timm_does():
    """How often an image stays as it is, and the mean of what is changed, of many images."""
    random.seed(0)
    np.random.seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    timms = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"interpolation": Image.Resampling.BICUBIC, "img_mean": FILL}
    )
    rng, augment = np.random.default_rng(0), RandAugment(9)
    changes = []
    for transform in (lambda: augment(image, rng), lambda: timms(image)):
        changes.append(np.sort([np.abs(np.asarray(transform(), int) - np.asarray(image)).mean() for _ in range(4000)]))
    ours, theirs = changes
    assert abs((ours == 0).mean() - (theirs == 0).mean()) < 0.03
    assert np.abs(ours - theirs)[::200].max() < 6


def test_rand_augment_is_seeded_and_varied():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    augment = RandAugment(9)
    for mode in ("RGB", "L"):
        picture = image.convert(mode)
        results = [np.asarray(augment(picture.copy(), np.random.default_rng(i))) for i in range(60)]
        again = np.asarray(augment(picture.copy(), np.random.default_rng(7)))
        assert np.array_equal(again, results[7])
        assert all(result.shape == np.asarray(picture).shape for result in results)
        same = sum(np.array_equal(result, np.asarray(picture)) for result in results)
        assert 5 < same < 35  # each of two operations happens with probability 0.5
        assert len({result.tobytes() for result in results}) > 20
