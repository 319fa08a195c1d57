import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.sources.class_folder import open_held_out, open_splits
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.sources.table import read_table

ROWS = [
    ("a/0.png", "cat", "train"),
    ("a/1.png", "dog", "train"),
    ("a/2.png", "dog", "validation"),
    ("a/3.png", "cat", "test"),
]


@pytest.fixture
def table(tmp_path):
    """A function that writes a table beside four images and returns its path."""
    (tmp_path / "a").mkdir()
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / "a" / f"{number}.png")

    def write(header="path,label,split", rows=ROWS, name="x.csv"):
        delimiter = "\t" if name.endswith("tsv") else ","
        lines = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
        (tmp_path / name).write_text("\n".join(lines) + "\n\n")
        return str(tmp_path / name)

    return write


def names(source):
    return [source.name(index) for index in range(len(source))]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.CSV"])
def test_images_of_a_table(table, name):
    source = open_images(table(name=name))
    assert names(source) == ["a/0.png", "a/1.png", "a/2.png", "a/3.png"]
    with source.open(2) as file, Image.open(file) as image:
        assert image.getpixel((0, 0)) == 2


def test_columns_by_their_usual_and_by_other_names(table):
    data = table(header="id,Class,Image", rows=[("1", "x", "a/0.png"), ("2", "y", "a/1.png")])
    assert names(open_images(data)) == ["a/0.png", "a/1.png"]
    data = table(header="where,what,fold", rows=ROWS)
    with pytest.raises(UserError, match="no column for the paths: name one of where, what, fold by `path_column`"):
        open_images(data)
    config = SourceConfig(path_column="where", label_column="what", split_column="fold")
    train, held_out = open_splits(data, None, 0, config=config)
    assert (names(train), names(held_out)) == (["a/0.png", "a/1.png"], ["a/2.png"])
    with pytest.raises(UserError, match="`label_column` kind is none of its columns: where, what, fold"):
        read_table(data, SourceConfig(path_column="where", label_column="kind"))


def test_splits(table):
    train, held_out = open_splits(table(), None, 0)
    assert train.classes == held_out.classes == ("cat", "dog")
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 1], [1])
    assert train.notes == ["1 of 2 classes have no held-out images, and no part in accuracy: cat"]
    assert names(open_held_out(table())) == ["a/2.png"]
    plain = table("path,label", [row[:2] for row in ROWS])
    assert len(open_held_out(plain)) == 4
    train, held_out = open_splits(plain, 0.5, 0)
    assert sorted(names(train) + names(held_out)) == [row[0] for row in ROWS]
    assert sorted(held_out.labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path", [], "holds no rows"),
        ("path,label", [("a/0.png",)], "row 2 has 1 columns, and the first line 2"),
        ("path,label", [("a/0.png", "cat"), ("", "cat")], "row 3 has no path"),
        ("path,label", [("a/0.png", "cat"), ("a/0.png", "cat")], "a/0.png is there twice: rows 2 and 3"),
        ("path,label", [("a/0.png", "cat"), ("a/0.png", "dog")], "is there twice, under two classes: rows 2 and 3"),
        ("path", [("b/0.png",)], "no path in it leads to a file: relative ones start from"),
        ("path", [('"a/0.png',)], "can't be read"),
    ],
)
def test_wrong_tables(table, header, rows, message):
    with pytest.raises(UserError, match=message):
        open_images(table(header, rows))


def test_missing_splits_and_classes(table):
    for rows, message in (
        (ROWS[:2], "no rows of the split val or test: make one"),
        (ROWS[2:], "split train: make one"),
    ):
        with pytest.raises(UserError, match=message):
            open_splits(table(rows=rows), None, 0)
    with pytest.raises(UserError, match="has splits already: leave `val_split` out"):
        open_splits(table(), 0.5, 0)
    with pytest.raises(UserError, match="no rows of the split val or test"):
        open_held_out(table(rows=ROWS[:2]))
    rows = [(f"a/{i}.png", "cat", "train") for i in range(4)]
    train, held_out = open_splits(table(rows=rows), 0.5, 0)  # of the training images, where none are held out
    assert (len(train), len(held_out)) == (2, 2)
    with pytest.raises(UserError, match="no column for the classes: name it by `label_column`"):
        open_splits(table("path,split", [row[::2] for row in ROWS]), None, 0)
    with pytest.raises(UserError, match="class newt of held-out rows is missing in train"):
        open_splits(table(rows=[*ROWS[:2], ("a/2.png", "newt", "val")]), None, 0)


def test_other_labels_are_another_fingerprint(table):
    first = open_splits(table(), None, 0)[0].fingerprint
    assert first == open_splits(table(), None, 0)[0].fingerprint
    swapped = [(path, {"cat": "dog", "dog": "cat"}[label], split) for path, label, split in ROWS]
    assert first != open_splits(table(rows=swapped), None, 0)[0].fingerprint


def test_labels_are_needed_for_classes_alone(table):
    data = table("path,label", [("a/0.png", "cat"), ("a/1.png", " ")])
    assert len(open_images(data)) == 2
    with pytest.raises(UserError, match=r"a/1.png has no label"):
        open_held_out(data)


def test_splits_of_other_names_are_not_dropped(table):
    data = table(rows=[*ROWS[:3], ("a/3.png", "cat", "fold3")])
    for opened in (lambda: open_splits(data, None, 0), lambda: open_held_out(data)):
        with pytest.raises(UserError, match="the split fold3 is none of train, val and test: rename it"):
            opened()
    assert len(open_images(data)) == 4
