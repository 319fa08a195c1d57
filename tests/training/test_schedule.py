import numpy as np
import pytest

from sparse_fcmae.training.schedule import cosine_lr


def test_warm_up_and_cosine():
    rates = [cosine_lr(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.001
    assert cosine_lr(0, 4, 4, 1.0) == 0.25
    assert cosine_lr(0, 4, 0, 1.0) == 1.0


def test_cosine_ends_at_the_least_rate():
    assert cosine_lr(9, 10, 5, 1.0, 0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 0.8)))
    assert cosine_lr(10, 10, 5, 1.0, 0.1) == pytest.approx(0.1)
    assert cosine_lr(2, 10, 5, 1.0, 0.1) == pytest.approx(0.6)
    assert cosine_lr(9, 10, 0, 1e-7, 1e-6) == pytest.approx(1e-7)
