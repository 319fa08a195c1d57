import numpy as np
import pytest
import torch
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.sources.class_folder import class_folder, open_described, open_held_out, open_splits
from sparse_fcmae.data.splits import few_labels


def make(root, **classes):
    """Class folders with so many pictures each."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, i, i)).save(root / name / f"{i}.png")
    return root


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_labels_follow_the_sorted_folders(tmp_path):
    folder = class_folder(make(tmp_path, dog=2, cat=3))
    assert folder.classes == ("cat", "dog")
    assert folder.labels.tolist() == [0, 0, 0, 1, 1]
    part = folder.take([4, 0])
    assert (names(part), part.labels.tolist(), len(part)) == (["dog/1.png", "cat/0.png"], [1, 0], 2)
    assert part.fingerprint != folder.fingerprint
    assert len(folder) == 5


def test_few_labels_are_seeded_and_balanced(tmp_path):
    folder = class_folder(make(tmp_path, a=9, b=7))
    few = few_labels(folder, 3, seed=1)
    assert few.labels.bincount().tolist() == [3, 3]
    assert names(few) == names(few_labels(folder, 3, seed=1))
    assert names(few) != names(few_labels(folder, 3, seed=2))
    with pytest.raises(UserError, match="`labels_per_class` 8: b has 7 images"):
        few_labels(folder, 8, seed=1)


def test_splits(tmp_path):
    make(tmp_path / "a" / "train", x=4, y=4)
    make(tmp_path / "a" / "test", x=1, y=2)
    train, val = open_splits(tmp_path / "a", None, 0)
    assert (len(train), len(val)) == (8, 3)
    make(tmp_path / "a" / "val", x=1, y=1)
    assert len(open_splits(tmp_path / "a", None, 0)[1]) == 2
    make(tmp_path / "b", x=10, y=3)
    train, val = open_splits(tmp_path / "b", 0.2, 0)
    assert val.labels.bincount().tolist() == [2, 1]
    assert not set(names(train)) & set(names(val))
    assert len(train) + len(val) == 13
    assert names(open_splits(tmp_path / "b", 0.2, 1)[1]) != names(val)


def test_classes_without_held_out_images_are_trained_on_and_said(tmp_path):
    make(tmp_path / "a" / "train", u=2, v=3, w=1, x=2, y=2)
    make(tmp_path / "a" / "val", v=1, y=2)
    train, val = open_splits(tmp_path / "a", None, 0)
    assert train.classes == val.classes == ("u", "v", "w", "x", "y")
    assert (len(train), val.labels.tolist(), val.counts()) == (10, [1, 4, 4], [0, 1, 0, 0, 2])
    assert train.notes == ["3 of 5 classes have no held-out images, and no part in accuracy: u, w, x"]
    assert val.take([2]).labels.tolist() == [4]
    train, val = open_splits(make(tmp_path / "b", u=4, v=1), 0.5, 0)
    assert (train.counts(), val.counts()) == ([2, 1], [2, 0])
    assert train.notes == ["1 of 2 classes have no held-out images, and no part in accuracy: v"]
    with pytest.raises(UserError, match=r"`val_split` 0.5 holds nothing out: no class of .* has more"):
        open_splits(make(tmp_path / "c", u=1, v=1), 0.5, 0)


def test_images_to_evaluate_on(tmp_path):
    assert len(open_held_out(make(tmp_path / "plain", x=4, y=4))) == 8
    make(tmp_path / "split" / "train", x=2, y=2)
    with pytest.raises(UserError, match="has no folder val or test: name a folder of classes"):
        open_held_out(tmp_path / "split")
    make(tmp_path / "split" / "test", x=1, y=2)
    assert len(open_held_out(tmp_path / "split")) == 3


def test_mistakes_in_folders_are_one_line(tmp_path):
    make(tmp_path / "one", x=2, y=2)
    make(tmp_path / "lacks" / "train", x=2, y=2)
    make(tmp_path / "lacks" / "val", x=2)
    make(tmp_path / "more" / "train", x=2)
    make(tmp_path / "more" / "val", x=2, y=1)
    make(tmp_path / "empty", x=2, y=0)
    make(tmp_path / "loose", x=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose" / "z.png")
    for name, split, message in (
        ("missing", None, "no such folder"),
        ("one", None, "has no folder train: make one, or hold images out with `val_split=0.1`"),
        ("one", 1.5, "`val_split` 1.5 leaves no image of x to train on"),
        ("one", 0.9, "leaves no image of x to train on"),
        ("lacks", 0.1, "has val already"),
        ("more", None, "class y of val is missing in train"),
        ("empty", 0.5, "class folder y holds no images"),
        ("loose", 0.5, "z.png lies in no class folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_splits(tmp_path / name, split, 0)


def test_class_folder_of_every_image_is_its_own(pictures):
    folder = class_folder(pictures)
    classes = np.array([file.split("/")[0] for file in names(folder)])
    assert torch.equal(folder.labels, torch.tensor(np.unique(classes, return_inverse=True)[1]))


def test_classes_are_known_where_all_images_lie_in_class_folders_or_a_table_says_them(tmp_path):
    flat, split = make(tmp_path / "flat", dog=2, cat=1), tmp_path / "split"
    make(split / "train", dog=1)
    make(split / "val", cat=1)
    for data, files in ((flat, ["cat/0.png", "dog/0.png", "dog/1.png"]), (split, ["train/dog/0.png", "val/cat/0.png"])):
        found = open_described(data)
        assert (names(found), found.classes) == (files, ("cat", "dog"))
        assert [found.classes[label] for label in found.labels] == [file.split("/")[-2] for file in files]
    (tmp_path / "a.csv").write_text("path,label\nflat/dog/0.png,wolf\nflat/cat/0.png,lynx\n")
    assert open_described(tmp_path / "a.csv").classes == ("lynx", "wolf")
    (tmp_path / "b.csv").write_text("path,label\nflat/dog/0.png,wolf\nflat/cat/0.png,\n")
    Image.new("RGB", (8, 8)).save(flat / "loose.png")
    for data, count in (
        (tmp_path / "b.csv", 2),
        (flat, 4),
        ([flat, split], 6),
        (tmp_path / "split" / "*" / "*" / "*.png", 2),
    ):
        found = open_described(data)
        assert (len(found), hasattr(found, "labels")) == (count, False)
