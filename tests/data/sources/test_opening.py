import os

import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.sources.opening import open_images


@pytest.fixture
def scans(tmp_path):
    """A folder a with x_w1.png and x_w2.png, and below it deep/y_w1.tif; beside it a text and a hidden image."""
    for name in ("a/x_w1.png", "a/x_w2.png", "a/deep/y_w1.tif", "a/.z_w1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "a" / "notes_w1.txt").write_text("x")
    return tmp_path


def read(source):
    found = []
    for index in range(len(source)):
        with source.open(index) as file, Image.open(file) as image:
            found.append(image.size)
    return found


def test_folder(scans):
    source = open_images(str(scans / "a"))
    assert [source.name(i) for i in range(len(source))] == ["deep/y_w1.tif", "x_w1.png", "x_w2.png"]


def test_patterns(scans):
    def files(pattern, **options):
        return open_images(os.path.join(scans, pattern), **options).files

    assert files("a/*_w1.*") == ["x_w1.png"]
    assert files("a/**/*_w1.*") == ["deep/y_w1.tif", "x_w1.png"]
    assert files("*/x_w[12].png") == ["a/x_w1.png", "a/x_w2.png"]
    assert files("a/**/*.*", without=scans / "a" / "deep") == ["x_w1.png", "x_w2.png"]
    source = open_images(os.path.join(scans, "a/**/*_w1.*"))
    assert source.notes == ["left out, as they are in no format that can be read: 1 .txt"]
    assert (str(source), read(source)) == (os.path.join(scans, "a/**/*_w1.*"), [(8, 8)] * 2)
    os.rename(scans / "a", scans / "b")
    assert open_images(os.path.join(scans, "b/**/*_w1.*")).fingerprint == source.fingerprint


def test_a_folder_with_signs_of_a_pattern_in_its_name(scans):
    os.rename(scans / "a", scans / "[a]*")
    assert len(open_images(str(scans / "[a]*"))) == 3


def test_patterns_of_the_working_folder(scans, monkeypatch):
    monkeypatch.chdir(scans / "a")
    source = open_images("*_w2.png")
    assert (source.files, read(source)) == (["x_w2.png"], [(8, 8)])


def test_lists(scans):
    path = scans / "list.txt"
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("L", (4, 6)).save(scans / name)
    lines = ["\ufeffa/x_w2.png", "", str(scans / "a" / "deep" / "y_w1.tif"), f"  {name}", "a/x_w2.png\r"]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    source = open_images(str(path))
    assert [source.name(i) for i in (0, 2, 3)] == ["a/x_w2.png", "caf\\udce9.png", "a/x_w2.png"]
    assert read(source) == [(8, 8), (8, 8), (4, 6), (8, 8)]
    path.write_text("a/x_w1.png\nmissing.png")
    assert open_images(str(path)).fingerprint != source.fingerprint
    with pytest.raises(FileNotFoundError):
        open_images(str(path)).open(1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing", "missing: no such folder or file"),
        ("labels.csv", "no rows"),
        ("empty.txt", "names no images"),
        ("wrong.txt", "no line of it names a file: relative paths start from"),
        ("a/*.jpg", "no image file matches this pattern"),
        ("a/*.txt", r"no image file matches this pattern \(left out, as they are .* 1 .txt\)"),
    ],
)
def test_mistakes(scans, data, message):
    (scans / "labels.csv").write_text("path")
    (scans / "empty.txt").write_text("\n")
    (scans / "wrong.txt").write_text("x.png\ny.png")
    with pytest.raises(UserError, match=message):
        open_images(str(scans / data))


def test_several(scans):
    (scans / "list.txt").write_text("a/x_w2.png\n")
    source = open_images([str(scans / "a"), str(scans / "list.txt")])
    assert len(source) == 4
    assert read(source) == [(8, 8)] * 4
    assert [source.name(i) for i in (0, 2, 3)] == [
        f"{scans / 'a'}: deep/y_w1.tif",
        f"{scans / 'a'}: x_w2.png",
        f"{scans / 'list.txt'}: a/x_w2.png",
    ]
    assert str(source) == f"{scans / 'a'} and {scans / 'list.txt'}"
    assert source.notes == [f"{scans / 'a'}: left out, as they are in no format that can be read: 1 .txt"]
    assert source.fingerprint != open_images([str(scans / "list.txt"), str(scans / "a")]).fingerprint
    assert open_images([str(scans / "a")]).fingerprint == open_images(str(scans / "a")).fingerprint
    with pytest.raises(UserError, match="no such folder"):
        open_images([str(scans / "a"), str(scans / "none")])


def test_compressed_archives_are_refused(scans):
    (scans / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"x.tar.gz: compressed, so unpack it to a .tar first"):
        open_images(str(scans / "x.tar.gz"))


def test_one_image(scans):
    source = open_images(str(scans / "a" / "x_w1.png"))
    assert ([source.name(i) for i in range(len(source))], read(source)) == (["x_w1.png"], [(8, 8)])
