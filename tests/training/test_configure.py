import json
from pathlib import Path

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.tasks.config import PretrainConfig
from sparse_fcmae.training.configure import configure


@pytest.fixture
def run(tmp_path):
    """A run's folder with the options that it was started with."""
    folder = tmp_path / "run"
    folder.mkdir()
    saved = {"data": "/images", "dtype": "bf16", "image_size": "64x96", "lr": 1e-3, "every": 7, "forgotten": 1}
    (folder / "config.json").write_text(json.dumps({"format": "sparse-fcmae pretraining run", **saved}))
    return folder


def test_options_are_written_out_so_that_any_folder_can_be_resumed_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(PretrainConfig, {"data": "images", "out": "run", "image_size": (64, 96), "knn": "/labelled"})
    assert (config.data, config.knn) == (str(tmp_path / "images"), "/labelled")
    assert (config.out, config.image_size, config.init) == ("run", "64x96", None)
    assert configure(PretrainConfig, {"data": "x", "image_size": 32}).image_size == "32"
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_the_options_it_was_started_with(run):
    config = configure(PretrainConfig, {"out": str(run), "resume": True, "log_every": 1, "dtype": "auto"})
    assert (config.data, config.dtype, config.image_size, config.lr) == ("/images", "bf16", "64x96", 1e-3)
    assert (config.log_every, config.eval_every) == (1, 7)
    assert configure(PretrainConfig, {"out": str(run), "resume": True, "image_size": (64, 96)}) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 2e-3}, "`lr` is 0.002 but the run in .*run has 0.001: leave it out to resume, or start another run"),
        ({"dtype": "fp32"}, "`dtype` is fp32 but the run in .*run has bf16"),
        ({"image_size": 64}, "`image_size` is 64 but the run in .*run has 64x96"),
        ({"log_every": 0}, "`log_every` must be greater than 0"),
    ],
)
def test_another_run_is_not_resumed(run, options, message):
    with pytest.raises(UserError, match=message):
        configure(PretrainConfig, {"out": str(run), "resume": True, **options})


def test_weights_are_not_deleted_by_the_run_that_starts_from_them(run):
    options = {"data": "x", "out": str(run), "overwrite": True}
    for weights in (run, run / "exported"):
        with pytest.raises(UserError, match="lies in `out`, which `overwrite=True` deletes"):
            configure(PretrainConfig, {**options, "init": str(weights)})
    assert configure(PretrainConfig, {**options, "init": str(run) + "-other"}).init == str(Path(f"{run}-other"))


def test_images_are_needed():
    with pytest.raises(UserError, match="`data` is missing"):
        configure(PretrainConfig, {})
