import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.decoders.window import covering
from sparse_fcmae.data.sources.class_folder import class_folder
from sparse_fcmae.data.sources.files import ImageFiles
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.sources.pages import by_page
from sparse_fcmae.data.sources.parts import labelled_parts
from sparse_fcmae.data.sources.several import Several
from sparse_fcmae.data.sources.windows import Covering, Windows
from sparse_fcmae.data.views import CentreView, NativeView


def test_an_image_comes_as_often_as_windows_fit_into_it(tmp_path):
    for name, size in (("a", (64, 32)), ("b", (34, 40)), ("c", (100, 70)), ("d", (32, 32))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    source = ImageFolder(tmp_path)
    windows = Windows(source, NativeView((32, 32)), 0.0)
    assert [windows.name(i)[0] for i in range(len(windows))] == ["a", "a", "b", *["c"] * 6, "d"]
    assert str(windows) == str(tmp_path)
    assert windows.images == 4
    assert windows.notes == ["10 windows of 32x32 pixels in 4 images"]
    with windows.open(9) as file, source.open(3) as same:
        assert file.read() == same.read()
    assert windows.fingerprint == Windows(source, NativeView((32, 32)), 0.0).fingerprint
    assert windows.fingerprint != Windows(source, NativeView((16, 32)), 0.0).fingerprint


def test_unreadable_images_are_left_out_or_refused(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.zeros((64, 64), np.uint16))
    (tmp_path / "1.npy").write_text("x")
    source = ImageFolder(tmp_path)
    windows = Windows(source, NativeView((32, 32), Reading(1, "uint16")), 0.3)
    assert [windows.name(i) for i in range(0, 12, 4)] == ["0.npy", "2.npy", "3.npy"]
    assert len(windows) == 12
    assert windows.notes[1].startswith("left out, as 1 of 4 images can't be read: 1.npy: ")
    with pytest.raises(UserError, match=r"1 of 4 images are unreadable, such as 1.npy: .*raise `max_bad_images`"):
        Windows(source, NativeView((32, 32), Reading(1, "uint16")), 0.2)


def test_images_smaller_than_a_window_are_refused_at_once(tmp_path):
    for number, size in enumerate(((64, 64), (40, 30))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    source = ImageFolder(tmp_path)
    with pytest.raises(UserError, match=r"1.png: has 30x40 pixels, fewer than a native window of 32x32: lower"):
        Windows(source, NativeView((32, 32)), 0.1)
    assert len(Windows(source, NativeView((32, 32)), 0.5)) == 4
    assert len(Windows(source, NativeView((32, 32), scale=(0.5, 0.5)), 0.0)) == 5


@pytest.mark.parametrize("side", [32, 33, 63, 64, 65, 100, 128, 1000])
def test_as_few_windows_as_possible_cover_an_image(side):
    boxes = covering(side, 40, (16, 32))
    columns = sorted({left for left, _, _, _ in boxes})
    rows = sorted({top for _, top, _, _ in boxes})
    assert (len(columns), len(rows), len(boxes)) == (-(-side // 32), 3, 3 * -(-side // 32))
    seen = np.zeros((40, side), int)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (32, 16)
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1  # also that none reaches beyond the image, as the shape would differ
    assert boxes[0][:2] == (0, 0)
    assert boxes[-1][2:] == (side, 40)
    steps = np.diff(columns)
    assert not len(steps) or steps.max() - steps.min() <= 1


def test_there_are_no_windows_of_a_smaller_image():
    assert covering(31, 40, (16, 32)) == covering(40, 15, (16, 32)) == []


@pytest.fixture
def counted_images(tmp_path):
    """Three images whose values say where they lie, of which one is damaged and one smaller than a window."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4096, shape).astype(np.uint16) for shape in ((40, 70), (32, 32), (20, 90))]
    for number, values in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", values)
    (tmp_path / "3.npy").write_text("x")
    return arrays, open_images(tmp_path)


def test_covering_windows_are_images(counted_images):
    arrays, source = counted_images
    reading = Reading(1, "uint16")
    windows = Covering(source, (32, 32), reading)
    assert windows.counts().tolist() == [6, 1, 0, 0]
    assert [windows.name(number) for number in range(7)] == ["0.npy"] * 6 + ["1.npy"]
    assert [(image.name, image.reason[:20]) for image in windows.left_out] == [
        ("2.npy", "has 20x90 pixels, fe"),
        ("3.npy", windows.left_out[1].reason[:20]),
    ]
    expected = [arrays[0][top : top + 32, left : left + 32] for top in (0, 8) for left in (0, 19, 38)] + [arrays[1]]
    copied = pickle.loads(pickle.dumps(windows))
    for order in (range(7), (6, 0, 6, 3, 3)):
        for number in order:
            for one in (windows, copied):
                with one.open(number) as file:
                    pixels = CentreView((32, 32), reading)(file)
                assert np.array_equal(pixels[..., 0].numpy(), expected[number])


def test_an_image_is_opened_once_for_its_windows(counted_images, monkeypatch):
    _, source = counted_images
    windows, opened = Covering(source, (32, 32), Reading(1, "uint16")), []
    original = source.open
    monkeypatch.setattr(source, "open", lambda index: opened.append(index) or original(index))
    for number in (0, 1, 5, 6, 2):
        windows.open(number)
    assert opened == [0, 1, 0]


def test_a_forked_process_opens_its_own(counted_images):
    _, source = counted_images
    windows, reading = Covering(source, (32, 32), Reading(1, "uint16")), Reading(1, "uint16")
    image = windows.open(0).image
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(windows.open(0).image is image))
    process.start()
    assert queue.get() is False
    process.join()
    assert CentreView((32, 32), reading)(windows.open(0)).shape == (32, 32, 1)


def test_windows_of_pages(tmp_path):
    stack = np.random.default_rng(0).integers(0, 9, (3, 40, 64)).astype(np.uint8)
    np.save(tmp_path / "x.npy", stack)
    reading = Reading(1, "uint8", pages="images")
    windows = Covering(by_page(open_images(tmp_path), reading), (32, 32), reading)
    assert len(windows) == 3 * 4
    pixels = CentreView((32, 32), reading)(windows.open(11))
    assert np.array_equal(pixels[..., 0].numpy(), stack[2, 8:, 32:])
    assert windows.name(11) == "x.npy page 3"


def test_a_slow_count_is_kept_until_an_image_changes(counted_images, tmp_path, tmp_path_factory, monkeypatch):
    arrays, _ = counted_images
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("sparse_fcmae.data.sources.parts.SLOW", 0.0)
    opened = []

    def covering_windows(window=(32, 32)):
        opened.clear()
        source = open_images(tmp_path)
        original = source.open
        monkeypatch.setattr(source, "open", lambda index: opened.append(index) or original(index))
        return Covering(source, window, Reading(1, "uint16"))

    first = covering_windows()
    assert opened == [0, 1, 2, 3]
    again = covering_windows()
    assert opened == [2, 3]  # those that had no windows, whatever the reason was
    assert (again.fingerprint, again.notes, again.left_out) == (first.fingerprint, first.notes, first.left_out)
    covering_windows((16, 16))
    assert opened == [0, 1, 2, 3]
    np.save(tmp_path / "3.npy", arrays[0])  # readable now
    assert covering_windows().counts().tolist() == [6, 1, 0, 6]
    assert opened == [0, 1, 2, 3]
    os.remove(tmp_path / "3.npy")
    assert covering_windows().counts().tolist() == [6, 1, 0]


@pytest.mark.parametrize("kind", ["files", "channels", "archive", "several", "some"])
def test_versions_follow_the_bytes(tmp_path, tmp_path_factory, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}_1.npy", np.zeros((4, 4)))

    def version():
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(tmp_path / "a_1.npy", "a_1.npy")
        folder = open_images(tmp_path)
        made = {
            "files": lambda: folder,
            "channels": lambda: open_images(tmp_path, config=SourceConfig(channel_files=("{name}_1.npy",))),
            "archive": lambda: open_images(tmp_path / "x.tar"),
            "several": lambda: open_images([tmp_path, tmp_path / "x.tar"]),
            "some": lambda: Labelled.by_names(folder, ["x", "y"]).take([0]),
        }
        return made[kind]().version()

    before = version()
    assert before is not None
    np.save(tmp_path / "a_1.npy", np.zeros((5, 4)))
    assert version() != before


def test_what_can_change_unseen_has_no_version(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 4)))
    assert open_images([np.zeros((4, 4))]).version() is None
    assert Several([open_images(tmp_path), open_images([np.zeros((4, 4))])]).version() is None
    assert ImageFiles("", tmp_path, ["x.npy", "s3://bucket/x.npy"]).version() is None


def test_what_is_missing_and_zarr_folders_have_versions_too(tmp_path):
    (tmp_path / "x.zarr" / "0").mkdir(parents=True)
    (tmp_path / "x.zarr" / "0" / "chunk").write_bytes(b"1")
    source = ImageFiles("", tmp_path, ["x.zarr", "missing.npy"])
    versions = [source.version()]
    (tmp_path / "x.zarr" / "0" / "chunk").write_bytes(b"12")
    versions.append(source.version())
    np.save(tmp_path / "missing.npy", np.zeros(3))
    versions.append(source.version())
    (tmp_path / "elsewhere").mkdir()
    versions.append(ImageFiles("", tmp_path / "elsewhere", ["x.zarr", "missing.npy"]).version())
    assert len({*versions, None}) == 5


def test_an_image_that_has_changed_since_its_windows_were_counted_is_said(counted_images, tmp_path):
    _, source = counted_images
    windows = Covering(source, (32, 32), Reading(1, "uint16"))
    np.save(tmp_path / "0.npy", np.zeros((70, 32), np.uint16))
    with pytest.raises(OSError, match="has another size than when its windows were counted: has the file changed"):
        windows.open(0)


def test_labelled_windows_count_their_images(tmp_path):
    for name in ("x/0", "x/1", "y/0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", np.zeros((64, 64), np.uint16))
    images = class_folder(tmp_path)
    windows = labelled_parts(images, Windows(images.source, NativeView((32, 32), Reading(1, "uint16")), 0.0))
    assert (len(windows), windows.images, images.images) == (12, 3, 3)
    assert windows.labels.tolist() == [0] * 8 + [1] * 4


def test_windows_that_are_turned_fit_both_ways(tmp_path):
    for name, size in (("a", (40, 80)), ("b", (80, 40)), ("c", (80, 80))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    source = ImageFolder(tmp_path)
    upright, turned = (Windows(source, NativeView((32, 64), rotate=rotate), 1.0) for rotate in (False, True))
    assert [image.name for image in upright.left_out] == ["a.png"]
    assert [image.name for image in turned.left_out] == ["a.png", "b.png"]
    view = NativeView((32, 64), rotate=True)
    for seed in range(20):
        with source.open(2) as file:
            assert view(file, np.random.default_rng(seed)).shape == (32, 64, 3)
        with source.open(1) as file, pytest.raises(OSError, match="fewer than a native window of 64x32"):
            view(file, np.random.default_rng(seed))
