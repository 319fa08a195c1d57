"""Images behind addresses, from a local S3 and from local web servers, with and without parts of files."""

import errno
import functools
import http.server
import io
import os
import sys
import tarfile
import threading

import boto3
import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.batches import EvaluationImages, make_loader
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.sources import addresses
from sparse_fcmae.data.sources.addresses import Pieces, listed
from sparse_fcmae.data.sources.class_folder import open_held_out, open_splits
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.views import CentreView


def png(value):
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


FILES = {
    "train/cat/0.png": png(0),
    "train/cat/1 x.png": png(1),
    "train/dog/2.png": png(2),
    "val/dog/3.png": png(3),
    "val/cat/.hidden.png": b"x",
    "readme.md": b"nothing",
}
IMAGES = [name for name in FILES if name.endswith(".png") and "hidden" not in name]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "WAITS", (0.01, 0.01))
    return tmp_path / "cache" / "sparse-fcmae" / "pieces"


def archive(files):
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def s3():
    """A client of a local S3 whose bucket `images` holds FILES, and archives of them."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    place = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (place | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for name, content in FILES.items():
            client.put_object(Bucket="images", Key=f"set/{name}", Body=content)
        for split in ("train", "val"):
            files = {}
            for name in IMAGES:
                if name.startswith(split):
                    files |= {name: FILES[name], f"{name.rsplit('.', 1)[0]}.cls": name.split("/")[1].encode()}
            client.put_object(Bucket="images", Key=f"shards/{split}-0.tar", Body=archive(files))
        yield client
    server.stop()


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """A web server that knows no parts of files, as Python's own."""

    def log_message(self, *_):
        pass


class Parts(WholeFiles):
    """One that knows them."""

    def send_head(self):
        asked = self.headers.get("Range")
        path = self.translate_path(self.path)
        if not asked or not os.path.isfile(path):
            return super().send_head()
        first, last = asked.removeprefix("bytes=").split("-")
        with open(path, "rb") as file:
            file.seek(int(first))
            content = file.read(int(last) - int(first) + 1)
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return io.BytesIO(content)


@pytest.fixture(params=[WholeFiles, Parts])
def web(tmp_path, request):
    """The address of a local web server with FILES and archives of them."""
    for name, content in FILES.items():
        (tmp_path / "web" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "web" / name).write_bytes(content)
    (tmp_path / "web" / "shards").mkdir()
    (tmp_path / "web" / "shards" / "0.tar").write_bytes(archive({name: FILES[name] for name in IMAGES}))
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(request.param, directory=tmp_path / "web")
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def check(source, names=IMAGES):
    """Each image has the bytes that were put there, twice: fetched, and kept."""
    for _ in range(2):
        found = []
        for index in range(len(source)):
            with source.open(index) as file:
                found.append(file.read())
        assert found == [FILES[name] for name in names]


def test_a_bucket(s3, cache):
    source = open_images("s3://images/set")
    assert [source.name(i) for i in range(len(source))] == IMAGES
    assert source.notes == ["left out, as they are in no format that can be read: 1 .md"]
    check(source)
    assert len(list(cache.glob("*/*"))) == 4
    s3.put_object(Bucket="images", Key="set/train/cat/0.png", Body=png(77))  # another version of it
    try:
        with open_images("s3://images/set").open(0) as file:
            assert file.read() == png(77)
    finally:
        s3.put_object(Bucket="images", Key="set/train/cat/0.png", Body=FILES["train/cat/0.png"])
    check(open_images("s3://images/set/train/*/*.png"), IMAGES[:3])
    check(open_images("s3://images/set/train/dog/2.png"), IMAGES[2:3])


def test_classes_in_a_bucket(s3):
    train, val = open_splits("s3://images/set", None, 0)
    assert train.classes == val.classes == ("cat", "dog")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1], [1])
    check(train, IMAGES[:3])
    check(val, IMAGES[3:])
    assert open_held_out("s3://images/set/train").labels.tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="some images lie in no class folder"):
        open_held_out("s3://images/set/train/cat")


def test_archives_in_a_bucket(s3, cache):
    for _ in range(2):  # indexed, and remembered
        source = open_images("s3://images/shards/{train,val}-0.tar")
        assert source.name(0) == "train-0.tar/train/cat/0.png"
        check(source)
    assert not list(cache.parent.glob("indexes/.copy*"))
    check(open_images("s3://images/shards/*.tar"))
    train, val = open_splits("s3://images/shards/{train,val}-0.tar", None, 0)
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1], [1])
    with pytest.raises(UserError, match=r"s3://images/shards/none.tar: no such file or folder"):
        open_images("s3://images/shards/none.tar")


def test_loader_processes_read_a_bucket(s3):
    source = open_images("s3://images/set")
    source.open(0)  # the connection is not one that a forked process may use
    loader = make_loader(EvaluationImages(source, CentreView((8, 8))), [[0, 1], [2, 3]], 2, pin_memory=False)
    batches = list(loader)
    assert [batch.bad for batch in batches] == [[], []]
    assert [batch.pixels[:, 0, 0, 0].tolist() for batch in batches] == [[0, 1], [2, 3]]


def test_addresses_in_lists_and_tables(s3, tmp_path):
    places = [f"s3://images/set/{name}" for name in IMAGES]
    (tmp_path / "x.txt").write_text("\n".join(places))
    check(open_images(tmp_path / "x.txt"))
    (tmp_path / "x.csv").write_text("\n".join(["path,label", *(f"{place},a" for place in places)]))
    check(open_images(tmp_path / "x.csv"))


def test_a_web_server(web):
    source = open_images(f"{web}/train")
    assert [source.name(i) for i in range(len(source))] == ["cat/0.png", "cat/1%20x.png", "dog/2.png"]
    check(source, IMAGES[:3])
    source = open_images(f"{web}/shards/0.tar")
    check(source)
    assert len(source) == 4


def test_the_cache_keeps_to_its_limit(s3, cache):
    contents = {f"many/{number}.png": os.urandom(1000) for number in range(30)}
    for name, content in contents.items():
        s3.put_object(Bucket="images", Key=name, Body=content)
    pieces = Pieces(limit_gb=10_500 / 1e9)
    for name, content in contents.items():
        assert pieces.read(f"s3://images/{name}", "1", size=1000) == content
    kept = list(cache.glob("*/*"))
    assert 9000 <= sum(path.stat().st_size for path in kept) <= 10_500
    for name, content in contents.items():
        assert pieces.read(f"s3://images/{name}", "1", 100, 50) == content[100:150]
    none = Pieces(limit_gb=0)
    before = len(list(cache.glob("*/*")))
    assert none.read("s3://images/many/0.png", "2") == contents["many/0.png"]
    assert len(list(cache.glob("*/*"))) == before
    torn = next(iter(cache.glob("*/*")))
    torn.write_bytes(b"")
    for name, content in contents.items():
        assert pieces.read(f"s3://images/{name}", "1", 100, 50) == content[100:150]


def test_a_full_disk_is_said_once_and_done_without(s3, cache, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sparse_fcmae.data.sources.addresses.os.replace", full)
    check(open_images("s3://images/set"))
    assert capfd.readouterr().err == f"images are fetched each time anew: [Errno 28] {os.strerror(errno.ENOSPC)}\n"
    assert not list(cache.glob("*/*"))  # nor is anything left there


def test_without_a_home_nothing_is_kept(s3, monkeypatch, capfd):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)
    check(open_images("s3://images/set"))
    assert "images are fetched each time anew: Could not determine home" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"no folder for a copy of .*: Could not determine home"):
        open_images("s3://images/shards/train-0.tar")


def test_what_changes_on_a_web_server_is_read_anew(web, tmp_path):
    for place, index in ((f"{web}/train", 0), (f"{web}/shards/0.tar", 0)):
        with open_images(place).open(index) as file:
            assert file.read() == png(0)
    (tmp_path / "web" / "train" / "cat" / "0.png").write_bytes(png(9))
    (tmp_path / "web" / "shards" / "0.tar").write_bytes(archive({"train/cat/0.png": png(9)}))
    for path in (tmp_path / "web").rglob("*"):
        os.utime(path, (1e9, 1e9))
    for place in (f"{web}/train", f"{web}/shards/0.tar"):
        with open_images(place).open(0) as file:
            assert file.read() == png(9)


def test_folders_beside_the_splits_are_left_out_and_said(s3):
    for name in ("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "extra/x/3.png", "banner.png"):
        s3.put_object(Bucket="images", Key=f"beside/{name}", Body=png(0))
    assert len(open_images("s3://images/beside")) == 5
    train, val = open_splits("s3://images/beside", None, 0)
    assert (train.classes, len(train), len(val)) == (("cat", "dog"), 2, 1)
    assert "left out, as these are in none of train, val and test: 1 of extra, 1 of no folder" in train.notes


def test_what_can_not_be_reached_is_tried_again_and_said(s3, monkeypatch):
    tries = []

    def fail(system, path):
        tries.append(path)
        if len(tries) < 3:
            raise TimeoutError("slow")
        return "here"

    assert addresses.reach("http://images/x", fail) == "here"
    with pytest.raises(OSError, match="can't be reached: gone"):
        addresses.reach("http://images/x", lambda *_: (_ for _ in ()).throw(TimeoutError("gone")))
    for address, message in (
        ("s3://nowhere/set", "s3://nowhere/set: "),
        ("s3://images/empty", r"s3://images/empty: no (image files there|such file or folder)"),
        ("http://127.0.0.1:9/x", "http://127.0.0.1:9/x: can't be reached: "),
        ("ftp://host/x", "ftp://host/x: addresses begin with s3://"),
    ):
        with pytest.raises(UserError, match=message):
            open_images(address)
    with pytest.raises(UserError, match=r"127.0.0.1:9/x.tar: can't be reached"):
        open_images("http://127.0.0.1:9/x.tar")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"needs s3fs: pip install .* \(the extra remote\)"):
        open_images("s3://images/set")


def test_options_reach_the_cache(s3):
    source = open_images("s3://images/set", config=SourceConfig(cache_gb=3.5))
    assert source.pieces.limit == 3_500_000_000
    assert np.array_equal(source.sizes, [len(FILES[name]) for name in IMAGES])
    root, files = listed("s3://images/set/readme.md")
    assert (root, {name: size for name, (size, _) in files.items()}) == ("s3://images/set", {"readme.md": 7})


def test_a_disk_that_is_too_small_for_an_archive_is_said_at_once(s3, monkeypatch):
    async def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("s3fs.S3FileSystem._get_file", full)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"train-0.tar: no space left in .*indexes: XDG_CACHE_HOME names another"):
        open_images("s3://images/shards/train-0.tar")
