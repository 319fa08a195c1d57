import numpy as np
import pytest
import torch
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.labelled import ClassFolder, open_splits, outputs_of, wordnet_ids


def make(root, **classes):
    """Class folders with so many pictures each."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, i, i)).save(root / name / f"{i}.png")
    return root


def test_labels_follow_the_sorted_folders(tmp_path):
    folder = ClassFolder(make(tmp_path, dog=2, cat=3))
    assert folder.classes == ("cat", "dog")
    assert folder.labels.tolist() == [0, 0, 0, 1, 1]
    part = folder.take([4, 0])
    assert (part.files, part.labels.tolist(), len(part)) == (["dog/1.png", "cat/0.png"], [1, 0], 2)
    assert part.fingerprint != folder.fingerprint
    assert len(folder) == 5


def test_few_labels_are_seeded_and_balanced(tmp_path):
    folder = ClassFolder(make(tmp_path, a=9, b=7))
    few = folder.few(3, seed=1)
    assert few.labels.bincount().tolist() == [3, 3]
    assert few.files == folder.few(3, seed=1).files
    assert few.files != folder.few(3, seed=2).files
    with pytest.raises(UserError, match="--labels-per-class 8: b has 7 images"):
        folder.few(8, seed=1)


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
    assert not set(train.files) & set(val.files)
    assert len(train) + len(val) == 13
    assert open_splits(tmp_path / "b", 0.2, 1)[1].files != val.files


def test_mistakes_in_folders_are_one_line(tmp_path):
    make(tmp_path / "one", x=2, y=2)
    make(tmp_path / "lacks" / "train", x=2, y=2)
    make(tmp_path / "lacks" / "val", x=2)
    make(tmp_path / "empty", x=2, y=0)
    make(tmp_path / "loose", x=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose" / "z.png")
    for name, split, message in (
        ("missing", None, "no such folder"),
        ("one", None, "has no folder train: make one, or hold images out with --val-split 0.1"),
        ("one", 1.5, "must be between 0 and 1"),
        ("one", 0.9, "leaves no image of x to train on"),
        ("lacks", 0.1, "has val already"),
        ("lacks", None, "class folder y of train is missing in val"),
        ("empty", 0.5, "class folder y holds no images"),
        ("loose", 0.5, "z.png lies in no class folder"),
    ):
        with pytest.raises(UserError, match=message):
            open_splits(tmp_path / name, split, 0)


def test_outputs_of_folders(tmp_path):
    ids = wordnet_ids()
    assert (len(ids), ids[0], ids[999]) == (1000, "n01440764", "n15075141")
    assert list(ids) == sorted(ids)
    some = ClassFolder(make(tmp_path / "r", **{ids[7]: 1, ids[300]: 1}))
    assert outputs_of(some, 1000, None).tolist() == [7, 300]
    assert outputs_of(some, 1000, ["tench, Tinca tinca", *(f"word {i}" for i in range(999))]).tolist() == [7, 300]
    assert outputs_of(some, 3, ["a", ids[300], ids[7]]).tolist() == [2, 1]
    assert outputs_of(some, 2, None).tolist() == [0, 1]
    numbers = ClassFolder(make(tmp_path / "v2", **{"10": 1, "9": 1}))
    assert outputs_of(numbers, 1000, None).tolist() == [10, 9]
    for classes, names, message in (
        (5, None, "has 2 class folders but the head 5 outputs"),
        (2, ["a", "b"], f"class folder {ids[7]} is none of the head's 2 classes: a, b"),
        (1000, [f"word {i}" for i in range(1000)], "is none of the head's 1000 classes: word 0, "),
    ):
        with pytest.raises(UserError, match=message):
            outputs_of(some, classes, names)
    with pytest.raises(UserError, match="class folder 10 is none"):
        outputs_of(numbers, 11, [f"word {i}" for i in range(11)])


def test_class_folder_of_every_image_is_its_own(pictures):
    folder = ClassFolder(pictures)
    names = np.array([file.split("/")[0] for file in folder.files])
    assert torch.equal(folder.labels, torch.tensor(np.unique(names, return_inverse=True)[1]))
