import hashlib
import os
import shutil

import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.sources import folder
from sparse_fcmae.data.sources.folder import ImageFolder


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_every_depth_in_a_fixed_order(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/deep/er/x.webp", "c.tiff", "d.bmp", "e.gif", ".hidden.png", ".cache/f.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    folder = ImageFolder(tmp_path)
    assert folder.files == ["a/deep/er/x.webp", "a/z.jpg", "b.PNG", "c.tiff", "d.bmp", "e.gif"]
    assert len(folder) == 6


def test_what_is_left_out_is_said(tmp_path):
    save(tmp_path / "a.png")
    assert ImageFolder(tmp_path).notes == []
    for name in ("x.foo", "y.FOO", "z.mat", "IM0001", ".DS_Store", os.fsdecode(b"n.caf\xe9")):
        (tmp_path / name).write_text("")
    kinds = ["2 .foo", "1 .caf\\udce9", "1 .mat", "1 without an extension"]
    (note,) = ImageFolder(tmp_path).notes
    start, found = note.split(": ")
    assert start == "left out, as they are in no format that can be read"
    assert sorted(found.split(", ")) == sorted(kinds)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"no image files in this folder or below it \(left out, .*2 \.foo"):
        ImageFolder(tmp_path)


def test_fingerprint_is_the_digest_of_the_names_that_runs_have_saved(tmp_path):
    for name in ("a/x.png", "b.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path)
    assert folder.fingerprint == ImageFolder(tmp_path).fingerprint == hashlib.sha256(b"a/x.png\nb.png").hexdigest()
    (tmp_path / "b.png").unlink()
    assert folder.fingerprint != ImageFolder(tmp_path).fingerprint


def test_the_index_of_a_large_folder_is_kept_until_the_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "KEPT_FROM", 3)
    root, scans = tmp_path / "data", []
    for name in ("a.png", "b/c.png", "b/d/e.png", "b/d/f.png"):
        save(root / name)
    (root / "g.mat").write_text("")

    def paths_below(*arguments):
        scans.append(arguments)
        return below(*arguments)

    below = folder.paths_below
    monkeypatch.setattr(folder, "paths_below", paths_below)

    def settle():
        """All folders were changed long ago."""
        for path in (root, root / "b", root / "b" / "d"):
            os.utime(path, (1e9 + len(scans), 1e9 + len(scans)))

    ImageFolder(root)  # which has just been changed: another file might come unseen
    ImageFolder(root)
    assert len(scans) == 2
    settle()
    first, again = ImageFolder(root), ImageFolder(root)
    assert len(scans) == 3
    assert list(first.files) == list(again.files) == ["a.png", "b/c.png", "b/d/e.png", "b/d/f.png"]
    assert (first.fingerprint, first.notes) == (again.fingerprint, again.notes)
    assert first.notes == ["left out, as they are in no format that can be read: 1 .mat"]
    save(root / "b" / "d" / "new.png")
    assert len(ImageFolder(root)) == 5
    settle()
    assert (len(ImageFolder(root)), len(ImageFolder(root, without=root / "b"))) == (5, 1)
    (root / "b" / "d" / "e.png").rename(root / "b" / "d" / "é.png")
    assert ImageFolder(root).name(4) == "b/d/é.png"
    settle()
    ImageFolder(root)
    shutil.rmtree(root / "b" / "d")
    assert len(ImageFolder(root)) == 2
    for path in (tmp_path / "cache").rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    assert len(ImageFolder(root)) == 2


def test_paths_come_in_the_order_of_their_text(tmp_path):
    names = [
        "a.b/x.png",
        "a/x.png",
        "a-b/y.png",
        "a.png",
        "ab.png",
        "a/a.png",
        "a/a/z.png",
        "Z.png",
        "é/x.png",
        "z z/x.png",
    ]
    for name in names:
        save(tmp_path / name)
    assert list(ImageFolder(tmp_path).files) == sorted(names)


def test_linked_folders_come_once(tmp_path):
    for name in ("data/a/x.png", "elsewhere/y.png", "data/run/z.png"):
        save(tmp_path / name)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    folder = ImageFolder(tmp_path / "data", without=tmp_path / "data" / "run")
    assert folder.files == ["a/x.png", "link/y.png"]


def test_images_open_as_files_and_have_names_that_can_be_printed(tmp_path):
    save(tmp_path / "a" / "x.png")
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    odd.write_bytes(b"some bytes")
    folder = ImageFolder(tmp_path)
    assert [folder.name(index) for index in range(2)] == ["a/x.png", "caf\\udce9.png"]
    with folder.open(1) as file:
        assert (file.read(), file.seek(0)) == (b"some bytes", 0)
    assert file.closed


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/missing: no such folder"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(UserError, match="no image files"):
        ImageFolder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        ImageFolder(tmp_path / "file")


def test_masks_beside_images_are_said(tmp_path):
    save(tmp_path / "a.tif")
    (tmp_path / "a.tif.msk").write_text("")
    (note,) = ImageFolder(tmp_path).notes
    assert "1 .msk; masks beside images are not heeded: gdal_translate" in note


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    source = ImageFolder(tmp_path)
    for index in range(2):
        with pytest.raises(OSError, match="is no regular file"):
            source.open(index)


def test_names_can_not_move_the_terminal(tmp_path):
    for name in ("a\nb.png", "\x1b[2Jc.png", "d\u202ee.png", "\u00e9 f.png"):
        save(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert sorted(source.name(index) for index in range(4)) == [
        "\\x1b[2Jc.png",
        "a\\nb.png",
        "d\\u202ee.png",
        "\u00e9 f.png",
    ]


def test_folders_of_runs_are_left_out_and_said(tmp_path):
    """Their pictures of reconstructions would be trained on otherwise."""
    for place in ("images", "old/reconstructions", "deep/er/run/reconstructions", "config"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "x.png")
    for run in ("old", "deep/er/run"):
        (tmp_path / run / "config.json").write_text('{\n  "format": "sparse-fcmae pretraining run",\n')
        (tmp_path / run / "checkpoints").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")  # of something else
    (tmp_path / "config" / "checkpoints").mkdir()
    folder = ImageFolder(tmp_path)
    assert list(folder.files) == ["config/x.png", "images/x.png"]
    assert "left out, as they are runs: deep/er/run, old" in folder.notes
    assert list(ImageFolder(tmp_path / "old" / "reconstructions").files) == ["x.png"]
