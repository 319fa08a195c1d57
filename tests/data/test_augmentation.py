import numpy as np
import pytest
from PIL import Image

from sparse_fcmae.data.augmentation import OPERATIONS, RandAugment

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
