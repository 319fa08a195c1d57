"""Folders that appear whole: what new_folder leaves where nothing was, and where processes were killed."""

import os
from pathlib import Path

import pytest
import torch

from sparse_fcmae import UserError
from sparse_fcmae.runtime.files import left_half_written, new_folder, save_pickled


def test_a_folder_is_made_with_those_above_it(tmp_path):
    path = tmp_path / "not" / "there"
    with new_folder(path) as temporary:
        assert list(temporary.iterdir()) == []
        assert not path.exists()
        (temporary / "x").write_text("x")
    assert [p.name for p in path.iterdir()] == ["x"]
    assert [p.name for p in path.parent.iterdir()] == ["there"]


def test_nothing_of_a_block_that_fails_is_left(tmp_path):
    def fail():
        with new_folder(tmp_path / "there") as temporary:
            (temporary / "x").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_filled_from_nothing_though_a_killed_process_had_this_number(tmp_path):
    stale = tmp_path / f".there.{os.getpid()}.tmp"
    stale.mkdir()
    (stale / "stale").write_text("x")
    with new_folder(tmp_path / "there") as temporary:
        (temporary / "new").write_text("y")
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["new"]


def test_what_a_killed_process_moved_away_goes_once_the_folder_is_there(tmp_path):
    lost = tmp_path / ".there.77.old"
    for folder, text in ((lost, "before"), (tmp_path / "there", "after")):
        folder.mkdir()
        (folder / "x").write_text(text)
    with pytest.raises(KeyError), new_folder(tmp_path / "there"):
        raise KeyError
    assert (tmp_path / "there" / "x").read_text() == "after"
    assert not lost.exists()


def test_all_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def moved(source, target):
        calls.append(f"-> {Path(target).name}")
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("open files have no names here")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    with new_folder(tmp_path / "there") as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(name)
    assert sorted(calls[:2]) == ["a", "b"]
    assert calls[2:] == [f".there.{os.getpid()}.tmp", "-> there", tmp_path.name]


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"can't write .*file/there: "), new_folder(tmp_path / "file" / "there"):
        pass


def test_names_of_what_is_half_written():
    for name in (".x.json.77.tmp", ".step-00000001.77.old"):
        assert left_half_written(name)
    for name in ("x.tmp", ".lock", ".tmp", "notes.old", ".x.tmp.txt", ".x.77.tmp2"):
        assert not left_half_written(name)


def test_a_full_disk_is_an_os_error_where_torch_would_raise_its_own(tmp_path):
    """/dev/full takes no byte."""
    save_pickled({"step": 3, "x": torch.arange(3)}, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert loaded["step"] == 3
    assert loaded["x"].tolist() == [0, 1, 2]
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_pickled(1, Path("/dev/full"))
