import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.runtime.run_folder import RunFolder

OUTPUTS = ("picture.png", "drawings")


@dataclass(frozen=True)
class Config:
    eval_every: int = 3
    resume: bool = False
    overwrite: bool = False


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run", "juggling")


def begin(run, **options):
    config = Config(**options)
    run.hold(config)
    run.begin(config, OUTPUTS)


def test_a_new_run_has_its_options_and_what_stands_beside_them(run):
    run.check(resume=False, overwrite=False)
    assert not run.path.exists()
    run.hold(Config())
    run.begin(Config(), OUTPUTS, classes=["a", "b"])
    saved = {"format": "sparse-fcmae juggling run", "eval_every": 3, "classes": ["a", "b"]}
    assert json.loads((run.path / "config.json").read_text()) == saved
    assert run.saved_options() == {"eval_every": 3, "classes": ["a", "b"]}
    assert (run.path / "checkpoints").is_dir()


def test_options_of_earlier_versions_have_their_names_of_today(run):
    run.path.mkdir()
    (run.path / "config.json").write_text('{"format": "sparse-fcmae juggling run", "every": 7, "seed": 1}')
    assert run.saved_options() == {"eval_every": 7, "seed": 1}
    assert RunFolder(run.path, "other").saved_options() is None


@pytest.mark.parametrize(
    ("there", "resume", "overwrite", "message"),
    [
        ("nothing", True, False, "holds no juggling run to resume: leave `resume` out to start one"),
        ("nothing", True, True, "`resume` and `overwrite` exclude each other"),
        ("file", False, False, "is a file: choose another"),
        ("strangers", False, True, "is not empty and holds no juggling run: choose another"),
        ("run", False, False, "holds a run: give `resume=True` to go on or `overwrite=True` to delete it"),
        ("run", True, False, None),
        ("run", False, True, None),
        ("empty", False, True, None),
        ("lock", False, False, None),
        ("leftovers", False, False, None),
        ("hidden", False, False, "is not empty and holds no juggling run: choose another"),
    ],
)
def test_folders_that_can_not_be_used_as_asked(run, there, resume, overwrite, message):
    if there == "file":
        run.path.write_text("x")
    elif there != "nothing":
        run.path.mkdir()
    if there == "strangers":
        (run.path / "config.json").write_text('{"format": "sparse-fcmae knitting run"}')
    elif there == "run":
        (run.path / "config.json").write_text('{"format": "sparse-fcmae juggling run"}')
    elif there == "lock":
        (run.path / ".lock").touch()
        (run.path / "wandb").mkdir()  # of a start at which another tracker was out of reach
    elif there == "hidden":
        (run.path / ".thesis.2024.old").mkdir()
    elif there == "leftovers":
        (run.path / ".config.json.77.tmp").touch()
    if message is None:
        run.check(resume, overwrite)
    else:
        with pytest.raises(UserError, match=message):
            run.check(resume, overwrite)


def test_overwriting_deletes_the_runs_own_files_and_no_others(run):
    begin(run)
    for name in ("checkpoints/step-00000001/meta.json", "exported/config.json", "drawings/1.png", "mine/1.png"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("x")
    for name in ("metrics.jsonl", "train.log", "events.out.tfevents.1", "picture.png", "notes.md", "loss.png"):
        (run.path / name).write_text("x")
    begin(run, overwrite=True)
    left = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert left == {".lock", "config.json", "mine/1.png", "notes.md", "loss.png"}


def test_what_a_killed_process_left_half_written_goes(run):
    begin(run)
    (run.path / "drawings").mkdir()
    (run.path / "mine").mkdir()
    users = {".thesis.2024.old", ".notes.tmp", "mine/.1.png.77.tmp"}
    for name in (
        ".config.json.77.tmp",
        "drawings/.1.png.77.tmp",
        ".events.out.tfevents.3.77.tmp",
        "metrics.jsonl",
        *users,
    ):
        (run.path / name).write_text("x")
    for name in ("checkpoints/.step-00000002.77.tmp", ".exported.77.old"):
        (run.path / name).mkdir()
    begin(run, resume=True)
    left = {str(p.relative_to(run.path)) for p in run.path.rglob("*")}
    assert left == {".lock", "config.json", "metrics.jsonl", "checkpoints", "drawings", "mine", *users}


def test_a_second_process_is_kept_out(run):
    begin(run)
    program = f"""
from dataclasses import make_dataclass
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.run_folder import RunFolder
config = make_dataclass("Config", ["resume", "overwrite"])(False, True)
try:
    RunFolder({str(run.path)!r}, "juggling").hold(config)
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "is in use by another process" in done.stdout
    assert run.saved_options() == {"eval_every": 3}


def test_a_folder_is_a_runs_at_every_moment_of_its_overwriting(run, monkeypatch):
    begin(run)
    for name in ("drawings/1.png", "picture.png", "metrics.jsonl"):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("x")
    deleted = []
    real_unlink, real_rmtree = Path.unlink, shutil.rmtree
    monkeypatch.setattr(Path, "unlink", lambda path, *a, **k: (deleted.append(path.name), real_unlink(path, *a, **k)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, *a, **k: (deleted.append(path.name), real_rmtree(path, *a, **k)))
    begin(run, overwrite=True)
    assert {"drawings", "picture.png", "metrics.jsonl", "checkpoints"} <= set(deleted)
    assert "config.json" not in deleted  # it is replaced


def test_what_another_process_did_meanwhile_is_seen(run):
    run.check(resume=False, overwrite=False)
    begin(RunFolder(run.path, "juggling"))
    with pytest.raises(UserError, match="holds a run: give `resume=True`"):
        run.hold(Config())
