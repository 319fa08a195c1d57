import pytest

from sparse_fcmae import UserError
from sparse_fcmae.data.config import RATIOS, ratios_of


def test_ratios():
    assert ratios_of(None) == RATIOS == (0.75, 4 / 3)
    assert ratios_of("0.5,2") == (0.5, 2)
    assert ratios_of("1,1") == ratios_of("1") == (1, 1)


@pytest.mark.parametrize("wrong", ["2,1", "0,1", "-1,1", "1,2,3", "1,inf", "nan,1", "a,b", ","])
def test_wrong_ratios(wrong):
    with pytest.raises(UserError, match="`crop_ratio`"):
        ratios_of(wrong)
