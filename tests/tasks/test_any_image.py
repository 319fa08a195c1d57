"""Images that are no photographs, from their files to exported weights and back."""

import json
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pyarrow
import pytest
import tifffile
import torch
from helpers import go_back, relative_error
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from timm.models import adapt_input_conv

from sparse_fcmae import UserError, convert, evaluate, finetune, load_encoder, load_transform, pretrain
from sparse_fcmae.cli import main
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.tasks.build import stem_for
from sparse_fcmae.weights.read import read_weights

SMALL = {
    "image_size": 32,
    "stem_stride": 1,
    "batch_size": 8,
    "epochs": 2,
    "num_workers": 1,
    "dtype": "fp32",
    "lr": 1e-3,
}
CHANNELS = 5


def scenes(folder, count=12, dtype=np.uint16, channels=CHANNELS):
    """Arrays in two class folders, in train and val; those of the second class are brighter in the last channel."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("field", "forest")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                values = rng.normal(np.arange(channels) * 1000 + 3000, 400, (40, 48, channels))
                values[..., -1] += 3000 * label
                np.save(folder / split / name / f"{number}.npy", values.astype(dtype))
    return folder


def test_five_channels_from_pretraining_to_evaluation(tmp_path):
    data = scenes(tmp_path / "data")
    pretrain(data=data / "train", out=tmp_path / "run", **SMALL, rotate=True)
    config = json.loads((tmp_path / "run" / "exported" / "config.json").read_text())
    values = np.stack([np.load(path) for path in (data / "train").glob("*/*.npy")]).astype(float)
    assert (config["dtype"], config["in_chans"]) == ("uint16", CHANNELS)
    assert config["mean"] == pytest.approx(values.mean((0, 1, 2)), rel=1e-3)
    assert config["std"] == pytest.approx(values.std((0, 1, 2)), rel=5e-3)
    form = ImageFormat.of_json(config)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert read_weights(checkpoint).form == form
    assert "the images are of 5 channels of uint16" in (tmp_path / "run" / "train.log").read_text()

    for to in ("timm", "huggingface"):
        convert(tmp_path / "run", tmp_path / to, to=to)
    tuning = SMALL | {"epochs": 30, "batch_size": 8, "drop_path": 0.0, "rand_augment": 9.0}
    del tuning["stem_stride"]
    finetune(data=data, init=tmp_path / "huggingface", out=tmp_path / "tuned", preset="atto", eval_every=30, **tuning)
    assert "RandAugment is left out" in (tmp_path / "tuned" / "train.log").read_text()
    assert read_weights(tmp_path / "tuned").form == form
    assert evaluate(data=data, init=tmp_path / "tuned")["top1"] > 0.9
    assert evaluate(data=data, init=tmp_path / "timm", knn=True)["images"] == 24

    path = data / "val" / "field" / "3.npy"
    image = load_transform(tmp_path / "run", crop_fraction=0.8)(path)
    expected = np.load(path)[4:36, 8:40].astype(np.float32)
    expected = torch.from_numpy((expected - config["mean"]) / config["std"]).movedim(-1, 0).float()
    assert relative_error(image, expected) < 1e-5
    assert load_encoder(tmp_path / "run")(image[None]).shape == (1, 320, 4, 4)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    with pytest.raises(OSError, match="has uint8 values, not uint16"):
        load_transform(tmp_path / "run")(tmp_path / "photo.png")


def test_pages_are_images_from_pretraining_to_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("dim", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                pages = rng.normal(1000 + 800 * label, 200, (6, 40, 48)).astype(np.uint16)
                tifffile.imwrite(tmp_path / split / name / f"{number}.tif", pages, photometric="minisblack")
    pretrain(data=tmp_path / "train", out=tmp_path / "run", pages="images", **SMALL, knn=tmp_path)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "24 pages in 4 files, each an image of its own" in log
    assert read_weights(tmp_path / "run").form.pages == "images"
    tuning = SMALL | {"epochs": 20, "drop_path": 0.0}
    del tuning["stem_stride"]
    finetune(data=tmp_path, init=tmp_path / "run", out=tmp_path / "tuned", preset="atto", eval_every=20, **tuning)
    found = evaluate(data=tmp_path, init=tmp_path / "tuned")
    assert (found["images"], found["top1"] > 0.9) == (24, True)
    assert evaluate(data=tmp_path, init=tmp_path / "run", knn=True)["train_images"] == 24
    finetune(
        data=tmp_path, from_scratch=True, out=tmp_path / "scratch", pages="images", preset="atto", stem_stride=1,
        eval_every=20, **tuning | {"epochs": 1},
    )  # fmt: skip
    assert "24 pages in 4 files" in (tmp_path / "scratch" / "train.log").read_text()
    path = tmp_path / "val" / "dim" / "0.tif"
    transform = load_transform(tmp_path / "run")
    assert not torch.equal(transform(path, page=0), transform(path, page=5))
    with pytest.raises(OSError, match=r"has 6 pages .*, each an image: say which"):
        transform(path)


def test_an_interrupted_run_goes_on_with_its_own_statistics(tmp_path):
    data = scenes(tmp_path / "data", 6, np.float32)
    for path in list(data.glob("train/*/*.npy"))[:5]:
        values = np.load(path)
        values[:20, :20], values[30, 30, 1], values[31, 31, 2] = np.nan, np.inf, -9999
        np.save(path, values)
    options = SMALL | {"epochs": 4, "batch_size": 4, "save_every": 5, "log_every": 1, "nodata": -9999}
    pretrain(data=data / "train", out=tmp_path / "whole", **options)
    pretrain(data=data / "train", out=tmp_path / "part", **options)
    go_back(tmp_path / "part", 5)
    for path in (data / "train").glob("*/*.npy"):  # were these measured again, the statistics would be others
        np.save(path, np.load(path))
    pretrain(out=tmp_path / "part", resume=True)
    whole, part = (load_file(tmp_path / run / "exported" / "model.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert "% of the values are missing" in (tmp_path / "whole" / "train.log").read_text()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(losses))
    with pytest.raises(UserError, match="`nodata` is 0"):
        pretrain(out=tmp_path / "part", resume=True, nodata=0.0)


@pytest.mark.parametrize(("channels", "word"), [(1, "summed for 1"), (5, "repeated and scaled for 5")])
def test_weights_of_other_channels_are_taken(tmp_path, pictures, channels, word):
    pretrain(data=pictures, out=tmp_path / "colour", **SMALL)
    data = scenes(tmp_path / "data", 6, channels=channels)
    options = {name: value for name, value in SMALL.items() if name != "stem_stride"}
    pretrain(data=data / "train", out=tmp_path / "run", init=tmp_path / "colour", **options)
    log = (tmp_path / "run" / "train.log").read_text()
    assert f"the stem's weights of 3 channels are {word}" in log
    assert "new decoder" in log
    assert read_weights(tmp_path / "run").form.in_chans == channels


@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_a_stem_is_adapted_as_timm_does(in_chans):
    stem = torch.randn(8, 3, 4, 4)
    assert torch.equal(stem_for(stem, in_chans), adapt_input_conv(in_chans, stem.clone()))


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    data = scenes(tmp_path / "data", 3)
    constant = tmp_path / "constant"
    constant.mkdir()
    np.save(constant / "x.npy", np.full((32, 32), 9, np.uint16))

    def fails(folder, *flags):
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", "--data", str(folder), "--out", str(tmp_path / "run"), *flags])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2
        assert not (tmp_path / "run").exists()
        return error

    assert "all values of the images measured are 9: nothing to learn" in fails(constant)
    assert "--in-chans 3: the images have 5, so leave it out" in fails(data, "--in-chans", "3")
    assert "--channels 0: they are counted from 1" in fails(data, "--channels", "0")
    assert "--channels x: give numbers" in fails(data, "--channels", "x")
    assert "--mean 1,2: give a number for each of the 5 channels" in fails(data, "--mean", "1,2", "--std", "1,2")
    assert "--stats imagenet is of 8-bit images" in fails(data, "--stats", "imagenet")
    assert "invalid choice: 'all'" in fails(data, "--pages", "all")


def test_native_windows(tmp_path, capsys):
    """Few large images are an epoch of many windows; an interrupted run goes on with the same ones."""
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(1)
    for number in range(3):
        tiles = {"tile": (64, 64), "compression": "deflate"}
        tifffile.imwrite(
            tmp_path / "data" / f"{number}.tif", rng.integers(0, 4096, (200, 330)).astype(np.uint16), **tiles
        )
    options = SMALL | {"batch_size": 32, "epochs": 2, "save_every": 3, "crop": "native", "rotate": True}
    pretrain(data=tmp_path / "data", out=tmp_path / "whole", **options)
    log = (tmp_path / "whole" / "train.log").read_text()
    assert "192 windows of 32x32 pixels in 3 images" in log
    assert "192 samples, 32 a step, 6 steps an epoch" in log
    assert read_weights(tmp_path / "whole").form.native
    window = load_transform(tmp_path / "whole")(tmp_path / "data" / "1.tif")
    middle = tifffile.imread(tmp_path / "data" / "1.tif")[84:116, 149:181].astype(np.float32)
    config = json.loads((tmp_path / "whole" / "exported" / "config.json").read_text())
    torch.testing.assert_close(window[0], torch.from_numpy((middle - config["mean"][0]) / config["std"][0]).float())
    pretrain(data=tmp_path / "data", out=tmp_path / "part", **options)
    go_back(tmp_path / "part", 6)
    pretrain(out=tmp_path / "part", resume=True, num_workers=2)
    whole, part = (load_file(tmp_path / run / "exported" / "model.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    for flag, value in (("scale", "1,2"), ("min-valid", "0.5"), ("min-std", "0.5")):
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "x"), f"--{flag}", value])
        assert stop.value.code == 2
        assert f"--{flag} goes with --crop native alone" in capsys.readouterr().err


def test_native_windows_from_pretraining_to_evaluation(tmp_path, capsys):
    """Classes that only the corners of large images tell apart: the windows in their middle are the same."""
    rng, data = np.random.default_rng(2), tmp_path / "data"
    for split in ("train", "val"):
        for label, name in enumerate(("plain", "marked")):
            (data / split / name).mkdir(parents=True)
            for number in range(2):
                values = rng.normal(1000, 100, (96, 160))
                values[:32, -32:] += 3000 * label
                values[-32:, :32] += 3000 * label
                np.save(data / split / name / f"{number}.npy", values.astype(np.uint16))
    native = SMALL | {"crop": "native", "batch_size": 16}
    pretrain(data=data / "train", out=tmp_path / "run", **native, knn=data)
    tuning = SMALL | {"epochs": 30, "drop_path": 0.0, "batch_size": 16}
    del tuning["stem_stride"]
    finetune(data=data, init=tmp_path / "run", out=tmp_path / "tuned", preset="atto", eval_every=30, **tuning)
    log = (tmp_path / "tuned" / "train.log").read_text()
    assert "60 windows of 32x32 pixels in 4 images" in log
    assert "60 samples, 16 a step" in log
    assert "4 images held out" in log
    capsys.readouterr()
    found = evaluate(data=data, init=tmp_path / "tuned")
    assert (found["images"], found["top1"]) == (4, 1.0)
    assert "60 windows of 32x32 pixels cover 4 images" in capsys.readouterr().err
    assert evaluate(data=data, init=tmp_path / "run", knn=True)["train_images"] == 4
    assert evaluate(data=data, init=tmp_path / "tuned", crop="resized")["images"] == 4
    with pytest.raises(UserError, match="`crop_fraction` goes with `crop=resized` alone"):
        evaluate(data=data, init=tmp_path / "tuned", crop_fraction=0.9)


def test_tables_and_archives_from_pretraining_to_evaluation(tmp_path, monkeypatch):
    """The same images from a folder, a table and archives give the same weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = scenes(tmp_path / "data", 8)
    files = sorted(path.relative_to(tmp_path) for path in data.glob("train/*/*.npy"))
    held_out = sorted(path.relative_to(tmp_path) for path in data.glob("val/*/*.npy"))
    rows = [f"{path},{path.parent.name},{path.parts[1]}" for path in (*files, *held_out)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    (tmp_path / "train.csv").write_text("\n".join(["path", *map(str, files)]))
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for path in files[8 * shard : 8 * shard + 8]:
                archive.add(tmp_path / path, path)
    for split, paths in (("train", files), ("val", held_out)):
        images = [(tmp_path / path).read_bytes() for path in paths]
        columns = {"image": images, "label": [path.parent.name for path in paths]}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{split}-0.parquet")
    places = {"folder": data / "train", "table": tmp_path / "train.csv", "tar": tmp_path / "{0..1}.tar"}
    places["parquet"] = tmp_path / "train-0.parquet"
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    places["web"] = f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar"
    for out, where in places.items():
        pretrain(data=where, out=tmp_path / out, **SMALL)
    server.shutdown()
    folder, *others = (load_file(tmp_path / run / "exported" / "model.safetensors") for run in places)
    assert all(torch.equal(folder[key], other[key]) for other in others for key in folder)
    tuning = SMALL | {"epochs": 20, "drop_path": 0.0, "eval_every": 20, "preset": "atto", "rand_augment": 0.0}
    del tuning["stem_stride"]
    finetune(data=tmp_path / "all.csv", init=tmp_path / "table", out=tmp_path / "tuned", label_column="label", **tuning)
    assert "--label-column label" in (tmp_path / "tuned" / "train.log").read_text()  # of the command that it suggests
    found = evaluate(data=tmp_path / "all.csv", init=tmp_path / "tuned")
    assert (found["images"], found["top1"] > 0.9) == (16, True)
    assert evaluate(data=tmp_path / "all.csv", init=tmp_path / "table", knn=True)["train_images"] == 16
    data = str(tmp_path / "*.parquet")
    finetune(data=data, init=tmp_path / "parquet", out=tmp_path / "tuned-parquet", **tuning)
    again = evaluate(data=data, init=tmp_path / "tuned-parquet")
    assert (again["top1"], again["confusion"]) == (found["top1"], found["confusion"])
