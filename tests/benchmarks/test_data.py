import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks import data as bench
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import RandomView

RAMP = np.linspace(0, 255, 40 * 30 * 3).astype(np.uint8).reshape(30, 40, 3)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def bench_rows(folder, **options):
    rows = bench.data(data=str(folder), image_size="32x48", images=20, rounds=1, **options)
    return {row["candidate"]: row for row in rows}


def test_bench_data_compares_with_torchvision(capsys, tmp_path, pictures):
    pytest.importorskip("torchvision")
    threads = torch.get_num_threads()
    rows = bench_rows(pictures, json=str(tmp_path / "rows.json"))
    assert list(rows) == ["sparse-fcmae", "torchvision v1", "torchvision v2"]
    assert all(row["ours_over_it"] > 0 and row["images"] == 20 for row in rows.values())
    assert rows["sparse-fcmae"]["difference"] < 1.5
    assert rows["sparse-fcmae"]["ours_over_it"] == 1
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == list(rows.values())
    assert written["environment"]["threads"] == 1
    assert torch.get_num_threads() == threads
    assert "images/s" in capsys.readouterr().out


def test_bench_data_candidates_give_batches_alike(pictures):
    pytest.importorskip("torchvision")
    with ImageFolder(pictures).open(0) as file:
        image = Image.open(file)
        ours = ImageFormat.imagenet().normalise(RandomView((32, 48))(image, np.random.default_rng(0))[None])
        for make in bench.CANDIDATES.values():
            theirs = make((32, 48))(image.convert("RGB"))
            assert (theirs.shape, theirs.dtype) == (ours.shape[1:], ours.dtype)
            assert theirs.abs().max() < 3


def test_bench_data_without_torchvision(capsys, monkeypatch, tmp_path, pictures):
    class Without:
        def find_spec(self, name, *_):
            if name == "torchvision":
                raise ModuleNotFoundError(name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(), *sys.meta_path])
    save(tmp_path / "broken.jpg", Image.fromarray(RAMP))
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "broken.jpg").read_bytes()[:-200])
    (tmp_path / "pictures").symlink_to(pictures)
    rows = bench_rows(tmp_path)
    for name in ("torchvision v1", "torchvision v2"):
        assert rows[name]["refused"] == "torchvision is not installed: pip install torchvision"
        assert "images_per_second" not in rows[name]
    ours = rows["sparse-fcmae"]
    assert (ours["images"], ours["unreadable"]) == (19, 1)
    assert ours["difference"] < 1.5
    assert ours["images_per_second"] > 0
    assert "is not installed" in capsys.readouterr().out


def test_bench_data_refuses_wrong_pixels(monkeypatch, pictures):
    class Inverted(RandomView):
        def __call__(self, file, rng):
            return 255 - super().__call__(file, rng)

    monkeypatch.setattr(bench, "RandomView", Inverted)
    ours = bench_rows(pictures)["sparse-fcmae"]
    assert "its pixels differ" in ours["refused"]
    assert "images_per_second" not in ours


def test_bench_data_wrong_options(tmp_path, pictures):
    with pytest.raises(UserError, match="no such folder"):
        bench.data(data=str(tmp_path / "none"))
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(UserError, match="none of the first 1 images can be read"):
        bench.data(data=str(tmp_path))
    for options in ({"images": 0}, {"rounds": 0}, {"seed": -1}, {"image_size": "0"}, {"image_size": "big"}):
        with pytest.raises(UserError, match=f"`{next(iter(options))}`"):
            bench.data(data=str(pictures), **options)
