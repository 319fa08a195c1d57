"""Data sets of Hugging Face's library and Parquet files, made by that library, by pyarrow, and on a local hub."""

import io
import os
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import hub
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.class_folder import open_held_out, open_splits
from sparse_fcmae.data.sources.hugging_face import DatasetImages
from sparse_fcmae.data.sources.opening import open_images

VALUES = np.random.default_rng(0).integers(0, 4096, (10, 16, 20)).astype(np.uint16)


def encoded(values):
    Image.fromarray(values).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


IMAGES = [encoded(values) for values in VALUES]
CLASSES = ["newt", "cat", "dog"]  # in no alphabetical order
SPLITS = ["train", "val"] * 5


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def dataset(rows=range(10), **more):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"img": [{"bytes": IMAGES[i], "path": f"{i}.png"} for i in rows], "label": [i % 3 for i in rows]}
    return datasets.Dataset.from_dict(columns | more, features=features)


def check(source, rows=range(10)):
    """Each image has the values that were written for its row."""
    assert len(source) == len(rows)
    for index, row in enumerate(rows):
        with source.open(index) as file:
            found = open_image(file, Reading(1, "uint16")).resized_crop((0, 0, 20, 16), (16, 20))
        assert np.array_equal(found[..., 0].numpy(), VALUES[row])


def names_of(labelled):
    return [labelled.classes[label] for label in labelled.labels.tolist()]


def test_a_saved_data_set(tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "saved")
    check(source)
    assert (source.name(3), source.notes) == ("row 3 (3.png)", [])
    check(pickle.loads(pickle.dumps(source)))
    labelled = open_held_out(tmp_path / "saved")
    check(labelled)
    assert names_of(labelled) == [CLASSES[i % 3] for i in range(10)]
    dataset().select([7, 2, 4]).save_to_disk(tmp_path / "some")
    check(open_images(tmp_path / "some"), [7, 2, 4])
    assert open_images(tmp_path / "some").fingerprint != source.fingerprint


def test_a_saved_data_set_of_splits(tmp_path):
    parts = {"train": dataset(range(6)), "validation": dataset(range(6, 10))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "saved")
    check(source)
    assert source.notes == ["images of the splits train (6), validation (4)"]
    train, val = open_splits(tmp_path / "saved", None, 0)
    check(train, range(6))
    check(val, range(6, 10))
    assert train.classes == val.classes == ("cat", "dog", "newt")
    assert names_of(val) == [CLASSES[i % 3] for i in range(6, 10)]
    with pytest.raises(UserError, match="has splits already"):
        open_splits(tmp_path / "saved", 0.5, 0)


def test_parquet_files_by_split(tmp_path):
    (tmp_path / "data").mkdir()
    dataset(range(4)).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    dataset(range(4, 6)).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    dataset(range(6, 10)).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    train, val = open_splits(tmp_path, None, 0)  # the folder above, as the hub has it
    check(train, range(6))
    check(val, range(6, 10))
    check(open_images(str(tmp_path / "data" / "train-*.parquet")), range(6))
    check(open_images(tmp_path / "data" / "test-00000-of-00001.parquet"), range(6, 10))
    assert open_images(tmp_path).notes == ["images of the splits test (4), train (6)"]


def test_parquet_that_other_programs_wrote(tmp_path):
    plain = pa.table({"name": list("abcdefghij"), "picture": IMAGES, "kind": [i % 2 for i in range(10)]})
    pq.write_table(plain, tmp_path / "x.parquet")
    check(open_images(tmp_path / "x.parquet"))
    labelled = open_held_out(tmp_path / "x.parquet", SourceConfig(label_column="kind"))
    assert names_of(labelled) == [str(i % 2) for i in range(10)]
    pairs = pa.table({"image": [{"bytes": image, "path": None} for image in IMAGES], "split": SPLITS})
    pq.write_table(pairs, tmp_path / "y.parquet")
    check(open_images(tmp_path / "y.parquet"))
    with pytest.raises(UserError, match="no column for the classes"):
        open_splits(tmp_path / "y.parquet", None, 0)
    for number, image in enumerate(IMAGES):
        (tmp_path / f"{number}.png").write_bytes(image)
    paths = pa.table({"path": [f"{i}.png" for i in range(10)], "label": list("aabbaabbaa"), "split": SPLITS})
    pq.write_table(paths, tmp_path / "z.parquet")
    check(open_images(tmp_path / "z.parquet"))
    train, val = open_splits(tmp_path / "z.parquet", None, 0)
    check(train, range(0, 10, 2))
    check(val, range(1, 10, 2))


def test_rows_without_an_image_or_a_label(tmp_path):
    table = pa.table({"image": [IMAGES[0], None, IMAGES[2]], "label": ["a", "b", None]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_images(tmp_path / "x.parquet")
    with pytest.raises(OSError, match="this row has no image"):
        source.open(1)
    with pytest.raises(UserError, match="row 2 has no label: give one, or leave it out"):
        open_held_out(tmp_path / "x.parquet")


def test_rows_that_name_files_in_the_place_of_bytes(tmp_path):
    """As the library gives them for repositories of image files."""
    for number, image in enumerate(IMAGES):
        (tmp_path / f"{number}.png").write_bytes(image)
    columns = {"image": [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(10)]}
    found = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(decode=False)}))
    source = DatasetImages("here", found, "image", [])
    check(source)
    columns["image"].reverse()
    other = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": datasets.Image(decode=False)}))
    assert DatasetImages("here", other, "image", []).fingerprint != source.fingerprint


def test_other_splits_are_left_out_and_said(tmp_path):
    parts = {"train": dataset(range(6)), "test": dataset(range(6, 9)), "unsupervised": dataset(range(9, 10))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert len(open_images(tmp_path / "saved")) == 10
    train, held_out = open_splits(tmp_path / "saved", None, 0)
    check(train, range(6))
    check(held_out, range(6, 9))
    assert "left out, as these are in none of train, val and test: 1 of unsupervised" in train.notes


def test_a_folder_of_images_is_no_data_set(tmp_path):
    for number, image in enumerate(IMAGES):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{number}.png").write_bytes(image)
    pq.write_table(pa.table({"path": ["deep/0.png"]}), tmp_path / "scores.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    source = open_images(tmp_path)
    check(source)
    assert source.notes == ["left out, as they are in no format that can be read: 1 .json, 1 .parquet"]


def test_fingerprints_of_parts_follow_images_and_labels(tmp_path):
    def train_of(images, labels):
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "x.parquet")
        return open_splits(tmp_path / "x.parquet", 0.5, 0)[0].fingerprint

    labels = list("aabbaabbab")
    first = train_of(IMAGES, labels)
    assert first == train_of(IMAGES, labels)
    assert first != train_of([image + b" " for image in IMAGES], labels)
    assert first != train_of(IMAGES, labels[::-1])


def test_mistakes(tmp_path):
    other = dataset().cast_column("label", datasets.Value("string"))
    datasets.DatasetDict({"train": dataset(), "test": other}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="saved: can't be read: "):
        open_images(tmp_path / "saved")

    with pytest.raises(UserError, match=r"x.parquet: no such file"):
        open_images(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no file matches this pattern"):
        open_images(tmp_path / "*.parquet")
    (tmp_path / "x.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match=r"x.parquet: can't be read: .*"):
        open_images(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty.parquet: holds no rows"):
        open_images(tmp_path / "empty.parquet")
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="no column holds images or paths: name one of a, b by `path_column`"):
        open_images(tmp_path / "y.parquet")
    with pytest.raises(UserError, match="`path_column` c is none of its columns: a, b"):
        open_images(tmp_path / "y.parquet", config=SourceConfig(path_column="c"))
    pq.write_table(pa.table({"left": IMAGES, "right": IMAGES}), tmp_path / "z.parquet")
    with pytest.raises(UserError, match="the columns left, right hold images: choose one by `path_column`"):
        open_images(tmp_path / "z.parquet")
    check(open_images(tmp_path / "z.parquet", config=SourceConfig(path_column="right")))


def test_the_library_is_named_where_it_is_missing(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs datasets: pip install datasets \(the extra datasets\)"):
        open_images(tmp_path / "x.parquet")


PROGRAM = """
import sys
from sparse_fcmae.data.sources.hugging_face import DatasetImages
from sparse_fcmae.data.sources.opening import open_images
source = open_images("hf://datasets/someone/pictures")
print(len(source), source.open(3).read() == open(sys.argv[1], "rb").read())
try:
    open_images("hf://datasets/someone/nothing")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_name_on_the_hub(tmp_path):
    (tmp_path / "hub").mkdir()
    dataset().to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    (tmp_path / "3.png").write_bytes(IMAGES[3])
    with hub(tmp_path / "hub", "someone/pictures", "datasets", tmp_path / "home") as place:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "3.png")]
        done = subprocess.run(command, env=dict(os.environ) | place, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == "10 True", done.stderr
    assert rest[0].startswith("UserError hf://datasets/someone/nothing: can't be read: ")
    assert len(rest) == 1
