import gzip
import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.sources import index_cache, shards
from sparse_fcmae.data.sources.class_folder import open_held_out, open_splits
from sparse_fcmae.data.sources.files import Paths
from sparse_fcmae.data.sources.opening import open_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparse-fcmae" / "indexes"


def png(value):
    Image.new("L", (8, 8), value).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write(path, contents):
    with tarfile.open(path, "w") as archive:
        for name, data in contents:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def archives(tmp_path):
    """Three archives of four images with captions and labels, as webdataset writes them."""
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        contents = []
        for number in range(4):
            key = f"deep/{shard}{number}"
            contents += [(f"{key}.png", png(40 * shard + 10 * number)), (f"{key}.txt", b"a cat"), (f"{key}.cls", b"3")]
        contents.append((".hidden.png", b"x"))
        write(tmp_path / "shards" / f"{shard:03}.tar", contents)
    return tmp_path / "shards"


def test_classes_and_splits(tmp_path):
    def sample(key, name):
        return [(f"{key}.seg.png", png(1)), (f"{key}.cls", name.encode())]

    write(tmp_path / "train-0.tar", [*sample("a/0", "dog\n"), *sample("b/0", "newt")])
    write(tmp_path / "train-1.tar", sample("a/0", "cat"))  # the same key, in another archive
    write(tmp_path / "val-0.tar", [*sample("a/1", "cat"), *sample("a/2", "newt")])
    for _ in range(2):  # found, and remembered
        train, val = open_splits(str(tmp_path / "{train-0,train-1,val-0}.tar"), None, 0)
        assert train.classes == val.classes == ("cat", "dog", "newt")
        assert (train.labels.tolist(), val.labels.tolist()) == ([1, 2, 0], [0, 2])
        assert val.name(1) == "val-0.tar/a/2.seg.png"
        assert open_held_out(str(tmp_path / "val-0.tar")).labels.tolist() == [0, 1]
    assert len(open_images(str(tmp_path / "*.tar"))) == 5
    write(tmp_path / "some.tar", [*sample("a", "dog"), ("b.png", png(2))])
    with pytest.raises(UserError, match=r"some.tar/b.png has no label"):
        open_held_out(str(tmp_path / "some.tar"))
    write(tmp_path / "none.tar", [("b.png", png(2))])
    with pytest.raises(UserError, match=r"none.tar: no .cls file beside an image names its class"):
        open_held_out(str(tmp_path / "none.tar"))
    write(tmp_path / "latin.tar", [("b.png", png(2)), ("b.cls", b"caf\xe9")])
    with pytest.raises(UserError, match=r"b.cls names no class, which is a word or number in UTF-8"):
        open_held_out(str(tmp_path / "latin.tar"))
    write(tmp_path / "extra-0.tar", sample("c", "cat"))
    with pytest.raises(UserError, match=r"the split extra-0.tar is none of train, val and test: rename it"):
        open_splits(str(tmp_path / "{train-0,val-0,extra-0}.tar"), None, 0)
    write(tmp_path / "long.tar", [("b.png", png(2)), ("b.cls", b"x" * 2000)])
    with pytest.raises(UserError, match=r"long.tar: b.cls names no class"):
        open_held_out(str(tmp_path / "long.tar"))


def values(source):
    found = []
    for index in range(len(source)):
        with source.open(index) as file:
            found.append(np.asarray(Image.open(file))[0, 0])
    return found


@pytest.mark.parametrize("pattern", ["{000..002}.tar", "*.tar", "00{0,1,2}.tar", "{000..001}.tar", "001.tar"])
def test_images_of_archives_in_their_order(archives, pattern):
    source = open_images(os.path.join(archives, pattern))
    numbers = {"{000..001}.tar": [0, 1], "001.tar": [1]}.get(pattern, [0, 1, 2])
    assert values(source) == [40 * shard + 10 * number for shard in numbers for number in range(4)]
    assert source.name(0) == f"{numbers[0]:03}.tar/deep/{numbers[0]}0.png"
    counts = 4 * len(numbers)
    assert source.notes == [f"passed over in the archives, as they are no images: {counts} .txt"]
    assert str(source) == os.path.join(archives, pattern)


def test_an_index_is_made_once_and_again_when_it_is_stale(archives, cache, monkeypatch):
    pattern = os.path.join(archives, "{000..002}.tar")
    first = open_images(pattern)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_members", lambda shard: 1 / 0)
        again = open_images(pattern)
    assert values(again) == values(first)
    assert (again.fingerprint, again.notes) == (first.fingerprint, first.notes)
    assert [again.name(i) for i in range(12)] == [first.name(i) for i in range(12)]
    write(archives / "001.tar", [("new.png", png(7))])
    changed = open_images(pattern)
    assert values(changed)[4] == 7
    assert changed.fingerprint != first.fingerprint
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert values(open_images(pattern)) == values(changed)


def test_an_index_that_can_not_be_kept_is_said(archives, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_cache, "write_atomic", full)
    source = open_images(os.path.join(archives, "000.tar"))
    assert len(source) == 4
    assert "the index is made again next time, as it can't be kept: [Errno 28] No space left" in source.notes[0]


def test_mistakes(archives, tmp_path):
    def fails(data, message):
        with pytest.raises(UserError, match=message):
            open_images(str(tmp_path / data))

    fails("shards/003.tar", r"003.tar: no such archive")
    fails("shards/{002..003}.tar", r"003.tar: no such archive")
    fails("shards/x*.tar", "no archive matches this pattern")
    write(tmp_path / "empty.tar", [])
    fails("empty.tar", "empty.tar: no image in this archive")
    write(tmp_path / "texts.tar", [("x.txt", b"x")])
    fails("texts.tar", "texts.tar: no image in this archive")
    whole = (archives / "000.tar").read_bytes()
    write(tmp_path / "large.tar", [("x.png", png(1)), ("y.png", os.urandom(5000))])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "large.tar").read_bytes()[:4000])
    fails("cut.tar", r"cut.tar: damaged")
    spoilt = bytearray((archives / "000.tar").read_bytes())
    with tarfile.open(archives / "000.tar") as archive:
        header = archive.getmembers()[3].offset
    for name, content in (
        ("header", spoilt[:header] + os.urandom(512) + spoilt[header + 512 :]),
        ("boundary", spoilt[:header]),
        ("twice", spoilt + spoilt),
    ):
        (tmp_path / f"{name}.tar").write_bytes(bytes(content))
        fails(f"{name}.tar", "damaged")
    (tmp_path / "x.png").write_bytes(png(1))
    os.link(tmp_path / "x.png", tmp_path / "y.png")
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        archive.add(tmp_path / "x.png", "x.png")
        archive.add(tmp_path / "y.png", "y.png")
    fails("links.tar", "links.tar: y.png is a link: pack the archive with --dereference")
    (tmp_path / "noise.tar").write_bytes(b"x" * 5000)
    fails("noise.tar", r"noise.tar: damaged or no tar archive")
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    fails("packed.tar", r"packed.tar: compressed, so unpack it first")
    (tmp_path / "x.zip").write_bytes(b"x")
    fails(
        "x.zip", r"x.zip: no text file with a path a line \(.txt\), table \(.csv, .tsv, .parquet\) or archive \(.tar\)"
    )


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
    ],
)
def test_braces(pattern, paths):
    assert shards.expanded(pattern) == paths


def test_names_are_kept_as_paths_are():
    names = ["a", "ü/b", "c\udce9"]
    assert list(Paths(names)) == names
