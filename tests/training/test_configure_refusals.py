"""Folders and options that a run is not configured for, with the remedy that is named."""

import json

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.tasks.config import FinetuneConfig, PretrainConfig
from sparse_fcmae.training.configure import configure


@pytest.fixture
def run(tmp_path):
    """A run's folder of pretraining."""
    folder = tmp_path / "run"
    folder.mkdir()
    saved = {"data": "/images", "model": "atto", "stem_stride": 4, "seed": 3, "init": "/weights", "knn": "/labelled"}
    (folder / "config.json").write_text(json.dumps({"format": "sparse-fcmae pretraining run", **saved}))
    return folder


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PretrainConfig, {"data": "x"}, "holds a run: give `resume=True` to go on or `overwrite=True` to delete it"),
        (PretrainConfig, {"resume": True, "overwrite": True}, "exclude each other"),
        (FinetuneConfig, {"resume": True}, "holds no fine-tuning run to resume"),
        (FinetuneConfig, {"data": "x", "overwrite": True}, "is not empty and holds no fine-tuning run"),
    ],
)
def test_the_folder_is_looked_at_first(run, kind, options, message):
    with pytest.raises(UserError, match=message):
        configure(kind, {"out": str(run), **options})


@pytest.mark.parametrize(
    ("options", "by_weights"),
    [({"seed": 4}, True), ({"model": "femto"}, False), ({"stem_stride": 2}, False), ({"init": "/other"}, False)],
)
def test_what_the_weights_fix_is_not_to_be_had_by_starting_from_them(run, options, by_weights):
    with pytest.raises(UserError, match="leave it out to resume, or start another run") as error:
        configure(PretrainConfig, {"out": str(run), "resume": True, **options})
    assert (f"from its weights with `init={run}`" in str(error.value)) is by_weights
    assert str(error.value).endswith("with another `out`") or by_weights


def test_what_is_given_again_as_it_was_is_no_change(run):
    options = {"seed": 3, "model": "atto", "init": "/weights", "data": "/moved", "knn": "/moved too"}
    config = configure(PretrainConfig, {"out": str(run), "resume": True, **options})
    assert (config.seed, config.data, config.knn) == (3, "/moved", "/moved too")  # places may change


@pytest.mark.parametrize("data", [None, ""])
def test_images_are_needed_to_start(tmp_path, data):
    with pytest.raises(UserError, match="`data` is missing: name the folder with the images"):
        configure(PretrainConfig, {"data": data, "out": str(tmp_path / "new")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be greater than 0, not 0"),
        ({"image_size": "big"}, "`image_size` big: give pixels as 224 or, height first, 224x320"),
        ({"lr": float("nan")}, "`lr` must be a finite number, not nan"),
        ({"grn_scope": "pixel"}, "`grn_scope` pixel: choose one of image, batch"),
    ],
)
def test_values_are_checked_and_nothing_is_made(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        configure(PretrainConfig, {"data": "x", "out": str(tmp_path / "new"), **options})
    assert not (tmp_path / "new").exists()
