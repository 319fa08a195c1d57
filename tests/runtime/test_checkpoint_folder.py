"""Which checkpoints of a run are whole, and that the newest of these is found whatever happened to the others."""

import json
import os

import pytest
from helpers import flip_bytes

from sparse_fcmae import UserError
from sparse_fcmae.runtime.checkpoint_folder import checkpoints_in, damage, damaged_checkpoints, newest_checkpoint
from sparse_fcmae.runtime.files import digest_of

FILES = ("model.safetensors", "trainer.pt")


def write(run, step, digests=True):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(bytes([step % 256, number]) * 500)
    meta = {"step": step, "bytes": dict.fromkeys(FILES, 1000)}
    if digests:
        meta["sha256"] = {name: digest_of(folder / name) for name in FILES}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def run(tmp_path):
    """A folder with three checkpoints, of which the newest sorts first as text, and files that are none."""
    for step in (9, 12, 123456789):
        write(tmp_path, step)
    for name in ("step-", "step-x", ".step-00000013.77.tmp", "step-00000014.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009\n")
    return tmp_path


def steps(run):
    return [int(path.name[5:]) for path in checkpoints_in(run)]


def test_the_newest_is_found_whatever_latest_says(run, tmp_path):
    assert steps(run) == [123456789, 12, 9]
    for latest in (b"step-00000009", b"step-00000077", b"", b"\xff\0"):
        (run / "checkpoints" / "latest").write_bytes(latest)
        assert newest_checkpoint(run).name == "step-123456789"
    (run / "checkpoints" / "latest").unlink()
    assert newest_checkpoint(run).name == "step-123456789"
    assert damaged_checkpoints(run) == []
    assert newest_checkpoint(tmp_path / "no such run") is None


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def removed(path):
    path.unlink()


def of_another_kind(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("spoil", [flip_bytes, truncated, emptied, removed, of_another_kind])
def test_one_with_a_damaged_file_is_left_out(run, name, spoil):
    spoil(run / "checkpoints" / "step-123456789" / name)
    assert newest_checkpoint(run).name == "step-00000012"
    (line,) = damaged_checkpoints(run)
    assert line.startswith(f"checkpoint {run / 'checkpoints' / 'step-123456789'} is damaged and left out: {name}")
    spoil(run / "checkpoints" / "step-00000012" / name)
    assert newest_checkpoint(run).name == "step-00000009"
    assert len(damaged_checkpoints(run)) == 2


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"7", b'{"bytes": 3}', b'{"bytes": {}}', b"\xff", b'{"bytes": {"a']
)
def test_one_without_a_whole_meta_is_left_out(run, content):
    (run / "checkpoints" / "step-123456789" / "meta.json").write_bytes(content)
    assert newest_checkpoint(run).name == "step-00000012"


def test_one_that_was_being_moved_is_left_out(run):
    for name in (*FILES, "meta.json"):
        (run / "checkpoints" / "step-123456789" / name).unlink()
    assert newest_checkpoint(run).name == "step-00000012"


def test_where_all_are_damaged_nothing_is_begun_anew_in_silence(run):
    for path in checkpoints_in(run):
        flip_bytes(path / "trainer.pt")
    with pytest.raises(UserError, match=r"has no whole checkpoint, step-123456789 for one: trainer.pt has other bytes"):
        newest_checkpoint(run)


def test_those_of_earlier_versions_have_no_digests(tmp_path):
    folder = write(tmp_path, 3, digests=False)
    assert damage(folder) is None
    flip_bytes(folder / "trainer.pt")
    assert damage(folder) is None
    truncated(folder / "trainer.pt")
    assert damage(folder) == "trainer.pt has 999 bytes and not 1000"


def test_a_file_is_read_again_only_when_it_has_changed(run, monkeypatch):
    read = []
    monkeypatch.setattr("sparse_fcmae.runtime.checkpoint_folder.digest_of", lambda p: read.append(p) or digest_of(p))
    newest_checkpoint(run)
    newest_checkpoint(run)
    assert len(read) == 2
    os.utime(run / "checkpoints" / "step-123456789" / "trainer.pt", ns=(1, 1))
    newest_checkpoint(run)
    assert len(read) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_one_that_may_not_be_read_is_left_out(run):
    (run / "checkpoints" / "step-123456789" / "trainer.pt").chmod(0)
    assert newest_checkpoint(run).name == "step-00000012"
