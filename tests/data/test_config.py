import pytest

from sparse_fcmae import UserError
from sparse_fcmae.data.config import RATIOS, range_of


def test_ratios():
    assert range_of("crop_ratio", None, RATIOS) == RATIOS == (0.75, 4 / 3)
    assert range_of("crop_ratio", "0.5,2", RATIOS) == (0.5, 2)
    assert range_of("crop_ratio", "1,1", RATIOS) == range_of("crop_ratio", "1", RATIOS) == (1, 1)


@pytest.mark.parametrize("wrong", ["2,1", "0,1", "-1,1", "1,2,3", "1,inf", "nan,1", "a,b", ","])
def test_wrong_ratios(wrong):
    with pytest.raises(UserError, match="`crop_ratio`"):
        range_of("crop_ratio", wrong, RATIOS)
