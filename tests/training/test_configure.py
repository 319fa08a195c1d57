import json
import os
import sys
from pathlib import Path

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.runtime.options import changes
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.tasks.config import FinetuneConfig, PretrainConfig
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
        ({"seed": 2}, "`seed` is 2 but the run in .*run has 0: leave it out to resume, or start another run"),
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


@pytest.fixture
def seeded(tmp_path):
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
def test_the_folder_is_looked_at_first(seeded, kind, options, message):
    with pytest.raises(UserError, match=message):
        configure(kind, {"out": str(seeded), **options})


@pytest.mark.parametrize(
    ("options", "by_weights"),
    [({"seed": 4}, True), ({"model": "femto"}, False), ({"stem_stride": 2}, False), ({"init": "/other"}, False)],
)
def test_what_the_weights_fix_is_not_to_be_had_by_starting_from_them(seeded, options, by_weights):
    with pytest.raises(UserError, match="leave it out to resume, or start another run") as error:
        configure(PretrainConfig, {"out": str(seeded), "resume": True, **options})
    assert (f"from its weights with `init={seeded}`" in str(error.value)) is by_weights
    assert str(error.value).endswith("with another `out`") or by_weights


def test_what_is_given_again_as_it_was_is_no_change(seeded):
    options = {"seed": 3, "model": "atto", "init": "/weights", "data": "/moved", "knn": "/moved too"}
    config = configure(PretrainConfig, {"out": str(seeded), "resume": True, **options})
    assert (config.seed, config.data, config.knn) == (3, "/moved", "/moved too")  # places may change


def test_images_are_needed_to_start(tmp_path):
    with pytest.raises(UserError, match="`data` is missing: name the folder with the images"):
        configure(PretrainConfig, {"data": None, "out": str(tmp_path / "new")})


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


def test_a_folder_that_weights_could_not_be_written_to_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match="`out` must be named in UTF-8"):
        configure(PretrainConfig, {"data": "x", "out": os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")})


def test_what_changes_a_run_from_here_on_is_told(run):
    before = RunFolder(run, "pretraining").saved_options()
    options = {"out": str(run), "resume": True}
    assert changes(before, configure(PretrainConfig, options)) == []
    config = configure(PretrainConfig, options | {"lr": 2e-3, "clip_grad": 1.0, "log_every": 3})
    assert (config.lr, config.base_lr, config.clip_grad) == (2e-3, None, 1.0)
    assert changes(before | {"clip_grad": None}, config) == [
        "changed from here on: --lr 0.002, which was 0.001",
        "changed from here on: --clip-grad 1, which was none",
    ]
    config = configure(PretrainConfig, options | {"base_lr": 1e-4})
    assert (config.lr, config.base_lr) == (None, 1e-4)  # or the rate that was given would mean nothing


def test_resuming_automatically_begins_where_there_is_no_run(run, tmp_path):
    fresh = configure(PretrainConfig, {"data": "x", "out": str(tmp_path / "new"), "resume": "auto"})
    assert fresh.resume is False
    found = configure(PretrainConfig, {"data": "/images", "out": str(run), "resume": "auto", "lr": 1e-3})
    assert (found.resume, found.dtype) == ("auto", "bf16")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no pretraining run"):
        configure(PretrainConfig, {"data": "x", "out": str(tmp_path / "other"), "resume": "auto"})
    with pytest.raises(UserError, match="exclude each other"):
        configure(PretrainConfig, {"data": "x", "out": str(run), "resume": "auto", "overwrite": True})
    with pytest.raises(UserError, match="`resume` perhaps: choose one of False, True, auto"):
        configure(PretrainConfig, {"data": "x", "out": str(run), "resume": "perhaps"})


@pytest.mark.parametrize("kind", ["json", "toml"])
def test_options_of_a_file_count_less_than_those_given(tmp_path, kind):
    path = tmp_path / f"recipe.{kind}"
    options = {
        "data": "/images",
        "batch-size": 8,
        "lr": 1e-3,
        "epochs": 5,
        "hflip": False,
        "channel_files": ["{name}"],
    }
    if kind == "toml":
        if sys.version_info < (3, 11):
            pytest.skip("TOML needs Python 3.11")
        path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items()))
    else:
        path.write_text(json.dumps(options))
    config = configure(PretrainConfig, {"config": str(path), "out": str(tmp_path / "new"), "lr": 2e-3})
    assert (config.data, config.batch_size, config.lr, config.epochs) == ("/images", 8, 2e-3, 5)
    assert (config.hflip, list(config.channel_files), config.config) == (False, ["{name}"], None)


def test_what_is_given_replaces_what_a_file_has_of_the_same_meaning(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"data": "/images", "max_steps": 1000, "lr": 1e-3, "epochs": 7}))
    given = {"config": str(tmp_path / "x.json"), "out": str(tmp_path / "new")}
    config = configure(PretrainConfig, given | {"epochs": 3, "base_lr": 1e-4})
    assert (config.epochs, config.max_steps, config.lr, config.base_lr) == (3, None, None, 1e-4)
    config = configure(PretrainConfig, given)
    assert (config.epochs, config.max_steps, config.lr) == (7, 1000, 1e-3)


def test_a_runs_config_starts_the_same_run_again(run, tmp_path):
    again = {"config": str(run / "config.json"), "out": str(tmp_path / "again")}
    config = configure(PretrainConfig, again)
    assert (config.data, config.dtype, config.lr, config.out) == ("/images", "bf16", 1e-3, str(tmp_path / "again"))
    with pytest.raises(UserError, match="is of a sparse-fcmae pretraining run, and this is fine-tuning"):
        configure(FinetuneConfig, again)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as JSON"),
        ("[1]", "holds no options by their names"),
        ('{"data": "x", "lrr": 1}', "there is no option lrr; is lr meant?"),
        ('{"data": "x", "xxxxxxxxx": 1}', "there is no option xxxxxxxxx$"),
        ('{"data": "x", "epochs": "ten"}', "`epochs` must be a whole number, not 'ten'"),
        ('{"data": "x", "lr": [1]}', "`lr` must be a number, not"),
        ('{"data": {"x": 1}}', "`data` is of the type dict: give a path"),
        ('{"data": "x", "hflip": "no"}', "`hflip` must be True or False, not 'no'"),
    ],
)
def test_a_file_of_options_that_is_none(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=message):
        configure(PretrainConfig, {"config": str(tmp_path / "x.json"), "out": str(tmp_path / "new")})


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe", ""])
def test_options_are_read_from_toml_and_json_alone(tmp_path, name):
    with pytest.raises(UserError, match=r"is neither a \.toml nor a \.json file: write the options"):
        configure(PretrainConfig, {"config": str(tmp_path / name), "out": str(tmp_path / "new")})


def test_a_spoilt_config_of_a_run_is_said(run):
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"epochs": "many"}))
    with pytest.raises(UserError, match="`epochs` must be a whole number, not 'many'"):
        configure(PretrainConfig, {"out": str(run), "resume": True})


@pytest.mark.parametrize("name", ["out", "data", "init", "knn"])
def test_an_empty_path_is_not_the_current_folder(name):
    with pytest.raises(UserError, match=f"`{name}` is empty: name a file or folder, or leave it out"):
        configure(PretrainConfig, {"data": "x", name: ""})
