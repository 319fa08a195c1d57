import pytest

from sparse_fcmae import UserError
from sparse_fcmae.data.sources.corruptions import corruption_folders

NAMES = ("snow", "fog", "frost")


def test_corruptions_one_or_two_levels_below(tmp_path):
    for path in ("group/snow/1", "group/snow/5", "group/snow/6", "fog/3", "group/nonsense/1", "group/frost"):
        (tmp_path / path).mkdir(parents=True)
    assert corruption_folders(tmp_path, NAMES) == {
        "fog": {"3": tmp_path / "fog" / "3"},
        "snow": {"1": tmp_path / "group" / "snow" / "1", "5": tmp_path / "group" / "snow" / "5"},
    }
    assert corruption_folders(tmp_path / "fog" / "3", NAMES) == {}
    (tmp_path / "file").touch()
    for name, message in (("none", "no such folder"), ("file", "is a file, name the folder that holds the images")):
        with pytest.raises(UserError, match=message):
            corruption_folders(tmp_path / name, NAMES)
