import os
import pickle

import pytest

from sparse_fcmae.data.sources.files import ImageFiles, Paths

NAMES = ["b/ü.png", "a.png", "", os.fsdecode(b"caf\xe9.png"), "a.png"]


def test_paths_are_a_sequence_of_the_strings_given():
    paths = Paths(iter(NAMES))
    assert (len(paths), list(paths)) == (5, NAMES)
    assert [paths[i] for i in (0, 4, -1, -5)] == [NAMES[i] for i in (0, 4, -1, -5)]
    assert paths == NAMES
    assert paths != NAMES[:4]
    assert list(pickle.loads(pickle.dumps(paths))) == NAMES
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            paths[wrong]
    assert len(Paths([])) == 0


def test_paths_take_little_memory():
    paths = Paths(f"train/n{i % 1000:08d}/image_{i:08d}.jpg" for i in range(10_000))
    assert len(paths.text) + paths.ends.nbytes < 10_000 * 45


def test_files_keep_their_order(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    files = ImageFiles("here", tmp_path, ["x", str(tmp_path / "x")])
    assert (len(files), str(files), files.notes, files.name(0)) == (2, "here", [], "x")
    for index in range(2):
        with files.open(index) as file:
            assert file.read() == b"1"
    assert files.fingerprint != ImageFiles("here", tmp_path, [str(tmp_path / "x"), "x"]).fingerprint
