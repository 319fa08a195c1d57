import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.decoders.image import PHOTOGRAPHS, Reading
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.sources.windows import Windows


def test_an_image_comes_as_often_as_windows_fit_into_it(tmp_path):
    for name, size in (("a", (64, 32)), ("b", (34, 40)), ("c", (100, 70)), ("d", (32, 32))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    source = ImageFolder(tmp_path)
    windows = Windows(source, (32, 32), PHOTOGRAPHS, 0.0)
    assert [windows.name(i)[0] for i in range(len(windows))] == ["a", "a", "b", *["c"] * 6, "d"]
    assert str(windows) == str(tmp_path)
    assert windows.notes == ["10 windows of 32x32 pixels in 4 images"]
    with windows.open(9) as file, source.open(3) as same:
        assert file.read() == same.read()
    assert windows.fingerprint == Windows(source, (32, 32), PHOTOGRAPHS, 0.0).fingerprint
    assert windows.fingerprint != Windows(source, (16, 32), PHOTOGRAPHS, 0.0).fingerprint


def test_unreadable_images_are_left_out_or_refused(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.zeros((64, 64), np.uint16))
    (tmp_path / "1.npy").write_text("x")
    source = ImageFolder(tmp_path)
    windows = Windows(source, (32, 32), Reading(1, "uint16"), 0.3)
    assert [windows.name(i) for i in range(0, 12, 4)] == ["0.npy", "2.npy", "3.npy"]
    assert len(windows) == 12
    assert windows.notes[1].startswith("left out, as 1 of 4 images can't be read: 1.npy: ")
    with pytest.raises(UserError, match=r"1 of 4 images are unreadable, such as 1.npy: .*raise `max_bad_images`"):
        Windows(source, (32, 32), Reading(1, "uint16"), 0.2)


def test_images_smaller_than_a_window_are_refused_at_once(tmp_path):
    for number, size in enumerate(((64, 64), (40, 30))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    source = ImageFolder(tmp_path)
    with pytest.raises(UserError, match=r"1.png: has 30x40 pixels, fewer than a native window of 32x32: lower"):
        Windows(source, (32, 32), PHOTOGRAPHS, 0.1)
    assert len(Windows(source, (32, 32), PHOTOGRAPHS, 0.5)) == 4
    assert len(Windows(source, (32, 32), PHOTOGRAPHS, 0.0, 0.5)) == 5
