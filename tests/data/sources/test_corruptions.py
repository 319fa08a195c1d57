import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.sources.corruptions import find_corruptions

NAMES = ("snow", "fog", "frost")


def test_corruptions_one_or_two_levels_below(tmp_path):
    for path in ("group/snow/1", "group/snow/5", "group/snow/6", "fog/3", "group/nonsense/1"):
        (tmp_path / path / "cat").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / path / "cat" / f"{path.replace('/', '-')}.png")
    (tmp_path / "group" / "frost").mkdir()
    found = find_corruptions(tmp_path, NAMES)
    names = {
        name: {severity: open_source().name(0) for severity, open_source in severities.items()}
        for name, severities in found.items()
    }
    assert names == {
        "fog": {"3": "cat/fog-3.png"},
        "snow": {"1": "cat/group-snow-1.png", "5": "cat/group-snow-5.png"},
    }
    assert find_corruptions(tmp_path / "fog" / "3", NAMES) == {}
    (tmp_path / ".snapshot").mkdir(mode=0)
    (tmp_path / "frost").mkdir()
    (tmp_path / "frost" / "2").touch()
    assert set(find_corruptions(tmp_path, NAMES)) == {"fog", "snow"}
    (tmp_path / "file").touch()
    for name, message in (("none", "no such folder"), ("file", "is a file, name the folder that holds the images")):
        with pytest.raises(UserError, match=message):
            find_corruptions(tmp_path / name, NAMES)


def test_a_severity_that_is_there_twice_is_refused(tmp_path):
    for path in ("fog/1", "extra/fog/3"):
        (tmp_path / path / "cat").mkdir(parents=True)
    assert set(find_corruptions(tmp_path, NAMES)["fog"]) == {"1", "3"}
    (tmp_path / "extra/fog/1/cat").mkdir(parents=True)
    with pytest.raises(UserError, match="fog of severity 1 is both"):
        find_corruptions(tmp_path, NAMES)


def test_a_severity_without_classes_is_not_passed_over(tmp_path):
    (tmp_path / "fog" / "1" / "cat").mkdir(parents=True)
    (tmp_path / "fog" / "2").mkdir()
    severities = find_corruptions(tmp_path, NAMES)["fog"]
    with pytest.raises(UserError, match="no image files in this folder"):
        severities["2"]()


def test_classes_named_like_corruptions_are_none(tmp_path):
    (tmp_path / "fog" / "1").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "fog" / "1" / "x.png")
    assert find_corruptions(tmp_path, NAMES) == {}
