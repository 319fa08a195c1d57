import pytest

from sparse_fcmae import UserError
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.destination import Destination


def place(path, to="timm"):
    return Destination(path, TARGETS[to])


@pytest.mark.parametrize(
    ("name", "to", "is_file"),
    [("x.safetensors", "timm", True), ("x.onnx", "onnx", True), ("x", "onnx", False), ("x.v2", "timm", False)],
)
def test_the_ending_tells_files_from_folders(tmp_path, name, to, is_file):
    assert place(tmp_path / name, to).is_file is is_file


@pytest.mark.parametrize(("name", "to"), [("x.onnx", "timm"), ("x.safetensors", "onnx"), ("x.bin", "huggingface")])
def test_files_of_another_kind_are_refused(tmp_path, name, to):
    with pytest.raises(UserError, match=f"`to={to}` can't write .*: name a folder, or a file that ends in"):
        place(tmp_path / name, to)


def test_nothing_of_the_users_is_replaced(tmp_path):
    source = tmp_path / "source" / "model.safetensors"
    source.parent.mkdir()
    source.write_text("weights")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.pdf").write_text("x")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "model.safetensors").write_text("x")
    for path, overwrite, message in (
        (tmp_path, True, "would be replaced by its own conversion"),
        (source, True, "would be replaced by its own conversion"),
        (full, False, "is not empty: choose another folder or give `overwrite=True`"),
        (full, True, r"holds more than a conversion \(thesis.pdf\): choose another folder"),
        (earlier, False, "is not empty"),
        (earlier / "model.safetensors", False, "is there already: choose another or give `overwrite=True`"),
        (full / "thesis.pdf", True, "is a file: name a folder"),
    ):
        with pytest.raises(UserError, match=message):
            place(path).check(source, overwrite)
    place(earlier).check(source, overwrite=True)
    place(tmp_path / "new").check(source, overwrite=False)
    assert {p.name for p in tmp_path.rglob("*")} == {"source", "model.safetensors", "full", "thesis.pdf", "earlier"}


@pytest.mark.parametrize("name", ["folder", "x.safetensors"])
def test_it_appears_when_the_block_ends_well(tmp_path, name):
    def fill(path):
        (path / "model.safetensors" if path.is_dir() else path).write_text("weights")

    def fail(target):
        with target.written_beside(dry_run=False) as path:
            fill(path)
            raise KeyError

    target = place(tmp_path / "deep" / name)
    with pytest.raises(KeyError):
        fail(target)
    with target.written_beside(dry_run=True) as path:
        fill(path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    with target.written_beside(dry_run=False) as path:
        fill(path)
        assert not target.path.exists()
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["weights"]
    assert target.path.exists()
