"""Features in files: what they are, how a killed call goes on, what is shown of them."""

import csv
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile
import torch
from helpers import fails, randomise, relative_error
from PIL import Image

from sparse_fcmae import UserError, create_encoder, embed, load_encoder
from sparse_fcmae.cli import main
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.evaluation import chunks, feature_files, neighbours
from sparse_fcmae.evaluation.feature_files import read_features
from sparse_fcmae.evaluation.neighbours import nearest_to, pairs_above
from sparse_fcmae.weights.convert import export_model

FILES = ["features.npz", "features.parquet", "features.npy"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "exported"
    export_model(randomise(create_encoder("atto", image_size=32, stem_stride=1)), folder)
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "SAMPLES", 8)


def of_files(encoder, paths):
    """The features of files by the public functions."""
    model = load_encoder(encoder)
    with torch.no_grad():
        return model(model.preprocess([str(path) for path in paths])).mean((2, 3))


@pytest.mark.parametrize("name", FILES)
def test_a_row_for_each_image_with_its_name_and_class(colours, encoder, tmp_path, small_chunks, name):
    out = embed(data=colours, init=encoder, out=tmp_path / name, dtype="fp32", batch_size=5, num_workers=1)
    found = read_features(out)
    assert found.features.dtype == np.float32
    assert found.files.tolist() == sorted(str(path.relative_to(colours)) for path in colours.rglob("*.png"))
    assert found.classes == ("blue", "green", "red")
    assert [found.classes[label] for label in found.labels] == [file.split("/")[1] for file in found.files]
    expected = of_files(encoder, [colours / file for file in found.files])
    assert relative_error(torch.tensor(found.features), expected) < 1e-5
    assert not list(tmp_path.glob("*.chunks"))
    if name.endswith(".npz"):
        with np.load(out) as arrays:
            assert set(arrays.files) == {"features", "files", "index", "labels", "classes", "settings"}
            assert [arrays["classes"][label] for label in arrays["labels"]] == [
                f.split("/")[1] for f in arrays["files"]
            ]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("maps", [False, True])
def test_any_stage_as_maps_or_means(colours, encoder, tmp_path, stage, maps):
    data = colours / "val"
    options = {"data": data, "init": encoder, "stage": stage, "maps": maps, "dtype": "fp32", "num_workers": 0}
    found = read_features(embed(out=tmp_path / "x.parquet", **options))
    model = load_encoder(encoder)
    with torch.no_grad():
        expected = model.features(model.preprocess([str(data / file) for file in found.files]))[stage - 1]
    assert found.features.shape[1:] == (expected.shape[1:] if maps else expected.shape[1:2])
    assert relative_error(torch.tensor(found.features), expected if maps else expected.mean((2, 3))) < 1e-5


@pytest.mark.parametrize("name", FILES)
def test_a_call_that_was_killed_goes_on_to_the_same_bytes(
    colours, encoder, tmp_path, small_chunks, name, monkeypatch, capsys
):
    options = {"data": colours, "init": encoder, "batch_size": 4, "num_workers": 0}
    whole = embed(out=tmp_path / "whole" / name, **options)
    write, written = chunks.write_atomic, []

    def killed_at_the_third(path, function):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, function)

    monkeypatch.setattr(chunks, "write_atomic", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed(out=tmp_path / "cut" / name, **options)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "SAMPLES", 8)
    assert not (tmp_path / "cut" / name).exists()
    assert f"interrupted: 2 of 5 chunks are in {tmp_path / 'cut' / name}.chunks; the same" in capsys.readouterr().out
    with pytest.raises(UserError, match="was begun with another stage: give `overwrite=True` to begin anew"):
        embed(out=tmp_path / "cut" / name, **options, stage=3)
    cut = embed(out=tmp_path / "cut" / name, **options)
    assert f"going on: 2 of 5 chunks are in {tmp_path / 'cut' / name}.chunks" in capsys.readouterr().out
    assert cut.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in cut.parent.iterdir()) == sorted(path.name for path in whole.parent.iterdir())


def test_a_file_that_is_there_is_not_made_again_nor_replaced(colours, encoder, tmp_path, capsys):
    options = {"data": colours, "init": encoder, "out": tmp_path / "x.npz", "num_workers": 0}
    embed(**options)
    before = (tmp_path / "x.npz").read_bytes()
    capsys.readouterr()
    embed(**options, nearest=colours / "val" / "red" / "1.png", neighbours=3)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path / 'x.npz'} is there already, of the same images, weights and options"
    assert said[2].split() == ["similarity", "image"]
    assert said[3].split() == ["1.0000", "train/red/1.png"]  # of the same colour, and earlier
    assert len(said) == 6
    with pytest.raises(
        UserError, match=r"`out` .*x.npz exists, made with another stage: choose another or give `overwrite"
    ):
        embed(**options, stage=2)
    np.savez(tmp_path / "mine.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="exists, made with another content"):
        embed(**options | {"out": tmp_path / "mine.npz"})
    assert (tmp_path / "x.npz").read_bytes() == before
    embed(**options, stage=2, overwrite=True)
    assert read_features(tmp_path / "x.npz").features.shape == (36, 80)


def test_two_processes_make_the_bytes_of_one(colours, encoder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from sparse_fcmae.evaluation import chunks\nchunks.SAMPLES = 8\nfrom sparse_fcmae.cli import main\nmain()\n"
    )
    arguments = ["embed", "--data", colours, "--init", encoder, "--batch-size", 4, "--num-workers", 0, "--out"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", SPARSE_FCMAE_PRODUCTS="mm")
    for folder, command in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]),
    ):
        words = [sys.executable, *command, program, *arguments, tmp_path / folder / "x.npz"]
        done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("36 rows of 320 features") == 1
    assert (tmp_path / "one" / "x.npz").read_bytes() == (tmp_path / "two" / "x.npz").read_bytes()


def test_unreadable_images_are_left_out_and_named(colours, encoder, tmp_path, small_chunks, capsys):
    shutil.copytree(colours / "val", tmp_path / "data")
    (tmp_path / "data" / "green" / "2.png").write_text("no picture")
    out = embed(data=tmp_path / "data", init=encoder, out=tmp_path / "x.npz", batch_size=1, num_workers=0)
    found = read_features(out)
    assert len(found.features) == 11
    assert "green/2.png" not in found.files
    assert found.index.tolist() == [i for i in range(12) if i != 6]
    beside = tmp_path / "x.npz.unreadable.txt"
    assert f"left out 1 that can't be read, which {beside} lists: green/2.png: " in capsys.readouterr().out
    assert beside.read_text().startswith("green/2.png: ")
    for file in (tmp_path / "data").rglob("*.png"):
        file.write_text("no picture")
    with pytest.raises(UserError, match=r"no image of .* is readable: blue/0.png"):
        embed(data=tmp_path / "data", init=encoder, out=tmp_path / "y.npz", num_workers=0)
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".npy"])
def test_windows_of_large_images_have_their_places(tmp_path, suffix):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    values = {name: rng.integers(0, 4096, size).astype(np.uint16) for name, size in (("a", (40, 60)), ("b", (32, 32)))}
    for name, array in values.items():
        tifffile.imwrite(tmp_path / "data" / f"{name}.tif", array)
    form = ImageFormat("uint16", (2000.0,), (1200.0,), native=True)
    model = randomise(create_encoder("atto", image_size=32, stem_stride=1, in_chans=1)).eval()
    export_model(model, tmp_path / "ours", form=form)
    options = {"data": tmp_path / "data", "init": tmp_path / "ours", "dtype": "fp32"}
    found = read_features(embed(out=tmp_path / f"x{suffix}", num_workers=0, **options))
    assert found.files.tolist() == ["a.tif"] * 4 + ["b.tif"]
    assert found.boxes.tolist() == [[0, 0, 32, 32], [28, 0, 60, 32], [0, 8, 32, 40], [28, 8, 60, 40], [0, 0, 32, 32]]
    for row, (left, top, right, bottom) in enumerate(found.boxes):
        window = values[found.files[row][0]][top:bottom, left:right].astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy((window - 2000) / 1200)[None, None]).mean((2, 3))[0]
        assert relative_error(torch.tensor(found.features[row]), expected) < 1e-5


def test_a_map_copies_and_neighbours(colours, encoder, tmp_path, capsys):
    shutil.copytree(colours / "val", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "red" / "1.png", tmp_path / "data" / "green" / "copy.png")
    embed(data=tmp_path / "data", init=encoder, out=tmp_path / "x.npz", duplicates=0.99999, preview=True, num_workers=0)
    with (tmp_path / "x.npz.duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"similarity": "1.000000", "image": "green/copy.png", "other": "red/1.png"} in rows
    assert "pairs are at least 0.99999 similar" in capsys.readouterr().out
    with Image.open(tmp_path / "x.npz.preview.png") as picture:
        assert picture.size == (1980, 990)
        assert len(picture.getcolors(1 << 22)) > 100


def test_pairs_are_those_of_all_pairs_in_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, 6)).astype(np.float32)
    features[31] = features[3]

    class Found:
        files, boxes = np.arange(40).astype(str), None

    Found.features = features
    centred = features.astype(float) - features.astype(float).mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    similarity = centred @ centred.T
    expected = {(a, b) for a in range(40) for b in range(a + 1, 40) if similarity[a, b] >= 0.6}
    pairs = pairs_above(Found, 0.6)
    assert {pair[1:] for pair in pairs} == expected
    assert pairs[0][1:] == (3, 31)
    assert [pair[0] for pair in pairs] == sorted((pair[0] for pair in pairs), reverse=True)


def test_an_index_finds_the_pairs_of_many(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbours, "EXACT", 100)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((4000, 16)).astype(np.float32)
    features[2000:2050] = features[:50] + 1e-3 * rng.standard_normal((50, 16)).astype(np.float32)

    class Found:
        pass

    Found.features = features
    assert {pair[1:] for pair in pairs_above(Found, 0.999)} == {(i, 2000 + i) for i in range(50)}


def test_mistakes_in_one_line(colours, encoder, tmp_path, capsys):
    options = ["embed", "--data", colours, "--init", encoder, "--num-workers", 0, "--out"]
    assert "must end in .npz, .parquet or .npy" in fails(capsys, *options, tmp_path / "x.csv")
    assert "compares whole images: leave out --maps" in fails(
        capsys, *options, tmp_path / "x.npz", "--maps", "--preview"
    )
    assert "--out is missing" in fails(capsys, *options[:-1])
    (tmp_path / "folder.npz").mkdir()
    assert "it is a folder" in fails(capsys, *options, tmp_path / "folder.npz")
    main([str(word) for word in (*options, tmp_path / "x.npz")])
    (tmp_path / "no.png").write_text("no picture")
    capsys.readouterr()
    assert f"--nearest {tmp_path / 'no.png'}: " in fails(
        capsys, *options, tmp_path / "x.npz", "--nearest", tmp_path / "no.png"
    )


def test_images_that_changed_under_their_names_are_said_where_nothing_tells_it(
    colours, encoder, tmp_path, capsys, monkeypatch
):
    data = str(tmp_path / "data.parquet")
    files = sorted(colours.rglob("*.png"))[:6]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [{"bytes": f.read_bytes(), "path": None} for f in files]}), data
    )
    options = {"data": data, "init": encoder, "out": tmp_path / "x.npz", "num_workers": 0}
    embed(**options)
    embed(**options)
    assert "whether images changed under the same names can't be told for this data" in capsys.readouterr().out
    monkeypatch.setattr(chunks, "SAMPLES", 2)
    monkeypatch.setattr("sparse_fcmae.evaluation.embed.write_rows", lambda *_: 1 / 0)
    for overwrite, goes_on in ((False, False), (False, True), (True, False)):
        with pytest.raises(ZeroDivisionError):
            embed(**options | {"out": tmp_path / "y.npz"}, overwrite=overwrite, batch_size=2)
        assert ("going on: 3 of 3 chunks" in capsys.readouterr().out) == goes_on


def test_options_of_reading_are_settings_too(colours, encoder, tmp_path):
    options = {"data": colours / "val", "init": encoder, "out": tmp_path / "x.npz", "num_workers": 0}
    embed(**options, max_megapixels=1.0)
    with pytest.raises(UserError, match="exists, made with another reading"):
        embed(**options, max_megapixels=2.0)


def test_nothing_beside_the_file_is_lost(colours, encoder, tmp_path):
    (tmp_path / "x.json").write_text("precious")
    (tmp_path / "x.npy.chunks").mkdir()
    (tmp_path / "x.npy.chunks" / "thesis.txt").write_text("precious")
    options = {"data": colours / "val", "init": encoder, "out": tmp_path / "x.npy", "num_workers": 0}
    with pytest.raises(
        UserError, match=r"x.npy.chunks holds thesis.txt, which is not of this command: move the folder"
    ):
        embed(**options)
    (tmp_path / "x.npy.chunks" / "thesis.txt").rename(tmp_path / "thesis.txt")
    embed(**options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt", "x.json", "x.npy", "x.npy.json"]
    assert (tmp_path / "x.json").read_text() == "precious"
    with pytest.raises(UserError, match="lies among the images of"):
        embed(**options | {"data": tmp_path})


def test_an_array_without_its_other_file_counts_for_nothing(colours, encoder, tmp_path, monkeypatch):
    options = {"data": colours / "val", "init": encoder, "out": tmp_path / "x.npy", "num_workers": 0}
    embed(**options)
    monkeypatch.setattr(feature_files, "write_atomic", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(**options, stage=3, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match="exists, made with another content"):
        embed(**options, stage=3)


def test_chunks_of_other_options_are_replaced_where_that_is_asked_for_or_there_are_none(
    colours, encoder, tmp_path, small_chunks, monkeypatch
):
    options = {"data": colours / "val", "init": encoder, "out": tmp_path / "x.npz", "num_workers": 0, "batch_size": 4}
    for stop in ("begin", "write_rows"):
        with monkeypatch.context() as patch:
            if stop == "begin":
                patch.setattr(chunks.Chunks, "_write", lambda *_: 1 / 0)
            else:
                patch.setattr("sparse_fcmae.evaluation.embed.write_rows", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                embed(**options)
        (tmp_path / "x.npz").unlink(missing_ok=True)
        embed(**options, stage=2, overwrite=stop == "write_rows")
        assert read_features(tmp_path / "x.npz").features.shape == (12, 80)
        (tmp_path / "x.npz").unlink()


def test_a_chunk_that_is_not_whole_is_made_again(colours, encoder, tmp_path, small_chunks, monkeypatch):
    options = {"data": colours / "val", "init": encoder, "batch_size": 4, "num_workers": 0}
    whole = embed(out=tmp_path / "whole.npz", **options).read_bytes()
    monkeypatch.setattr("sparse_fcmae.evaluation.embed.write_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(out=tmp_path / "x.npz", **options)
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "SAMPLES", 8)
    chunk = tmp_path / "x.npz.chunks" / "00000001.npz"
    chunk.write_bytes(chunk.read_bytes()[:100])
    assert embed(out=tmp_path / "x.npz", **options).read_bytes() == whole


@pytest.mark.parametrize("count", [2, 5, 12])
def test_copies_are_found_however_few_there_are(count, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    rng = np.random.default_rng(0)

    class Found:
        files, boxes = np.arange(count).astype(str), None
        features = np.repeat(rng.standard_normal((1, 6)).astype(np.float32), count, 0)

    assert len(pairs_above(Found, 1.0)) == count * (count - 1) // 2
    assert nearest_to(Found.features[0], Found, 1).splitlines()[1].split()[0] == "1.0000"
