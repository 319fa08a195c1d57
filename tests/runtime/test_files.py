import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_fcmae import UserError
from sparse_fcmae.runtime.files import (
    check_writable,
    leftover_of,
    new_folder,
    one_line,
    read_json,
    save_pickled,
    save_tensors,
    write_atomic,
    write_json,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}

    def half(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"can't write .*x.json: No space left on device"):
        write_atomic(path, half)
    assert read_json(path) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    write_json(tmp_path / "x.json", 1)
    assert calls == ["fsync", "replace", "fsync"]


def test_where_no_file_can_be_made(tmp_path):
    check_writable(tmp_path / "new")
    (tmp_path / "old").write_text("x")
    check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "x"
    assert not (tmp_path / "new").exists()
    for path, message in ((tmp_path, "it is a folder"), (tmp_path / "none" / "x", "No such file or directory")):
        with pytest.raises(UserError, match=message):
            check_writable(path)


def test_json_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{\n]")
    for name in ("x.json", "none.json"):
        with pytest.raises(UserError, match=f"{name} can't be read as JSON") as error:
            read_json(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_tensors_are_readable_by_whom_the_umask_allows(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_tensors({"x": torch.arange(6.0).view(2, 3).t()}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.arange(6.0).view(2, 3).t())


def test_a_folder_replaces_the_one_before_when_it_is_filled(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("x")
    (tmp_path / "link").symlink_to("there")
    with new_folder(tmp_path / "link") as temporary:
        (temporary / "new").write_text("y")
        assert (tmp_path / "there" / "old").exists()
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["new"]
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "there"]


def test_a_folder_stays_where_filling_or_moving_fails(tmp_path, monkeypatch):
    path = tmp_path / "there"
    path.mkdir()
    (path / "old").write_text("x")
    with pytest.raises(KeyError), new_folder(path):
        raise KeyError
    real, moves = os.replace, []

    def failing(source, target):
        moves.append(target)
        if len(moves) == 2:  # the old folder is out of the way, the new one does not come
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match=r"can't write .*there: Input/output error"), new_folder(path) as temporary:
        (temporary / "new").write_text("y")
    assert len(moves) == 3
    assert [p.name for p in path.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_messages_fit_on_a_line():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"
    assert json.dumps(one_line(OSError(2, "No such file", "x"))) == "\"[Errno 2] No such file: 'x'\""


def test_a_folder_comes_back_where_a_process_was_killed_while_it_moved_it(tmp_path):
    old = tmp_path / ".there.77.old"
    old.mkdir()
    (old / "old").write_text("x")
    with pytest.raises(KeyError), new_folder(tmp_path / "there"):
        raise KeyError
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


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
    for name in ("x.json", "step-00000001", "v2.77", "my notes", "exp[12]"):
        assert leftover_of(f".{name}.77.tmp") == leftover_of(f".{name}.77.old") == name
    for name in (
        "x.tmp",
        ".lock",
        ".tmp",
        "notes.old",
        ".x.tmp.txt",
        ".x.77.tmp2",
        ".thesis.old",
        ".x.7a.old",
        "..77.tmp",
        ".config.json.20261126.old",
    ):
        assert leftover_of(name) is None


@pytest.mark.parametrize("name", ["out", "exp[12]"])
def test_leftovers_of_folders_with_names_alike_stay(tmp_path, name):
    own = tmp_path / f".{name}.77.old"
    others = [
        tmp_path / other for other in (".out.v2.77.old", ".exp1.77.old", ".out.my notes.old", ".out.20261126.old")
    ]
    for folder in (own, *others):
        folder.mkdir()
        (folder / "model").write_text("the only copy")
    with new_folder(tmp_path / name) as temporary:
        (temporary / "new").write_text("x")
    assert not own.exists()
    assert all((folder / "model").is_file() for folder in others)


def test_a_killed_processs_half_written_folder_goes_and_a_living_ones_stays(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        pass
    half, living = tmp_path / f".out.{dead.pid}.tmp", tmp_path / f".out.{os.getppid()}.tmp"
    for folder in (half, living):
        folder.mkdir()
    with new_folder(tmp_path / "out"):
        assert not half.exists()
    assert living.is_dir()


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_an_oserror_of_what_torch_saves(tmp_path):
    (tmp_path / "trainer.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_pickled({"x": torch.randn(1_000_000)}, tmp_path / "trainer.pt")


def test_what_is_pickled_is_read_again(tmp_path):
    save_pickled({"x": torch.arange(5), "y": {"z": [1, "a"]}}, tmp_path / "trainer.pt")
    found = torch.load(tmp_path / "trainer.pt", weights_only=True)
    assert found["x"].tolist() == [0, 1, 2, 3, 4]
    assert found["y"] == {"z": [1, "a"]}
