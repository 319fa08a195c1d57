import json

import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.cli import main
from sparse_fcmae.tasks.inspection import advice, inspect


@pytest.fixture
def stacks(tmp_path):
    """Arrays of two channels, a copy of one, a photograph, a damaged file and one that is left out."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for number in range(6):
        size = (40 + 10 * number, 64, 2)
        np.save(folder / f"{number}.npy", rng.normal([1000, 50], [100, 5], size).astype(np.uint16))
    (folder / "copy.npy").write_bytes((folder / "0.npy").read_bytes())
    Image.new("RGB", (8, 8)).save(folder / "photo.png")
    Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(folder / "broken.png")
    (folder / "broken.png").write_bytes((folder / "broken.png").read_bytes()[:5000])
    (folder / "x.mat").write_bytes(b"x")
    return folder


def test_report_and_pictures(stacks, tmp_path, capsys):
    found = inspect(data=stacks, out=tmp_path / "out", image_size=32, rotate=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"9 images of {stacks}, of which 9 were looked at"
    assert "of 2 channels of uint16: 7" in lines
    assert "photographs of 8 bits: 1" in lines
    assert "pixels by area: least 8x8, median 60x64, greatest 90x64" in lines
    assert any(line.startswith("1 can't be read (") and line.endswith(": broken.png") for line in lines)
    assert "1 has the same bytes as another: 0.npy = copy.npy" in lines
    assert "left out, as they are in no format that can be read: 1 .mat" in lines
    assert any(line.startswith("channel 2: values from ") for line in lines)
    assert "training reads 2 channels of uint16" in lines
    saved = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert saved["kinds"] == found["kinds"] == {"of 2 channels of uint16": 7, "photographs of 8 bits": 1}
    assert saved["copies"] == [["0.npy", "copy.npy"]]
    assert list(saved["unreadable"]) == ["broken.png"]
    assert saved["format"]["mean"] == pytest.approx([1000, 49.5], rel=0.01)
    with Image.open(tmp_path / "out" / "views.png") as picture:
        assert picture.size == (4 * 100 + 4, 18 + 114 * 6)
    with Image.open(tmp_path / "out" / "histograms.png") as picture:
        assert picture.size[0] > 700
    with pytest.raises(UserError, match="holds an inspection: choose another or give `overwrite=True`"):
        inspect(data=stacks, out=tmp_path / "out")
    inspect(data=stacks, out=tmp_path / "out", overwrite=True, image_size=32, crop="native")


def test_a_sample_and_no_pictures(stacks, capsys):
    found = inspect(data=stacks, images=3)
    assert (found["images"], found["looked_at"]) == (9, 3)
    assert "pictures in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("median", "expected"),
    [
        ((28, 40), "--image-size 32 --stem-stride 1"),
        ((32, 32), "--image-size 32 --stem-stride 1"),
        ((90, 70), "--image-size 64 --stem-stride 2"),
        ((150, 150), "--image-size 160 --stem-stride 4"),
        ((200, 300), None),
        ((500, 896), None),
        ((2000, 1000), "made at least 4 times smaller: --crop native"),
    ],
)
def test_advice_about_sizes(median, expected):
    lines = advice({"least": (1, 1), "median": median, "greatest": (9000, 9000)}, (224, 224))
    assert len(lines) == (expected is not None)
    assert all(expected in line for line in lines)


def test_advice_is_given(tmp_path, capsys):
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 9, 9)).save(tmp_path / f"{number}.png")
    line = "half of the images are enlarged to be seen: --image-size 32 --stem-stride 1 suits them"
    assert line in inspect(data=tmp_path)["notes"]
    assert line in capsys.readouterr().out
    assert line not in inspect(data=tmp_path, image_size=32)["notes"]
    assert not advice({}, (224, 224))


def test_the_report_comes_before_what_is_wrong(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.full((8, 8), 3, np.int16))
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "--data", str(tmp_path)])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "of 1 channel of int16: 1" in printed.out
    assert "all values of the images measured are 3: nothing to learn" in printed.err
    with pytest.raises(SystemExit):
        main(["inspect"])
    assert "--data is missing" in capsys.readouterr().err
