"""Experiment trackers, each really run, without a server."""

import json
import math
import sqlite3
import sys
import zipfile

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.training import writers
from sparse_fcmae.training.writers import WRITERS, Writer, Writers, check_trackers

OPTIONS = {"model": "atto", "lr": 1e-3, "val": None}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The environment in which each of them stays on this machine; a run's folder."""
    for name, value in {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def track(kind, run, step=0, said=None):
    """Tells a tracker of two steps behind `step`."""
    told = Writers.of(kind, run, OPTIONS, step)
    told.begin(run, step, (said if said is not None else []).append)
    told.rows([(step + i, {"loss": 1 / (step + i), "lr": 0.5, "mfu": math.nan}) for i in (1, 2)])
    told.close()


def test_mlflow_goes_on_with_its_run(offline):
    mlflow = pytest.importorskip("mlflow")
    track("mlflow", offline)
    track("mlflow", offline, step=2)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("sparse-fcmae").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert run.data.params == {"model": "atto", "lr": "0.001", "val": "None"}
    assert run.info.status == "FINISHED"


def records(log):
    """The contents of the records in a file of W&B: in blocks of 32 KiB, which may divide a word, as LevelDB's logs."""
    at = 7  # the file's own header
    while at + 7 <= len(log):
        if at // 32768 < (at + 6) // 32768:  # too little is left of the block for a record's header
            at = -(-at // 32768) * 32768
            continue
        length = int.from_bytes(log[at + 4 : at + 6], "little")
        yield log[at + 7 : at + 7 + length]
        at += 7 + length


def test_wandb_writes_for_a_later_upload(offline):
    pytest.importorskip("wandb")
    track("wandb", offline)
    (folder,) = (offline / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    content = b"".join(records(file.read_bytes()))
    name = json.loads((offline / "trackers.json").read_text())["name"]
    assert name in folder.name
    assert all(part in content for part in (b"loss", b"0.5", b"atto"))


def test_comet_writes_for_a_later_upload(offline):
    pytest.importorskip("comet_ml")
    track("comet", offline)
    (file,) = offline.rglob("*.zip")
    messages = zipfile.ZipFile(file).read("messages.json").decode()
    found = [json.loads(line)["payload"] for line in messages.splitlines()]
    metrics = {
        (m["metric"]["metricName"], m["metric"]["step"]): m["metric"]["metricValue"] for m in found if m.get("metric")
    }
    assert float(metrics["loss", 2]) == 0.5


def test_trackio_has_a_database_of_its_own(offline, tmp_path):
    pytest.importorskip("trackio")
    track("trackio", offline)
    (file,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(file) as database:
        found = [(step, json.loads(values)) for step, values in database.execute("select step, metrics from metrics")]
    assert [(step, values["loss"]) for step, values in found if "loss" in values] == [(1, 1.0), (2, 0.5)]


class Broken(Writer):
    def __init__(self, run, name, options, step):
        if name == "refuse":
            raise ConnectionError("no\nserver")

    def rows(self, rows):
        raise ConnectionError("gone\naway")

    def close(self):
        raise AssertionError("it is told nothing more")


def test_one_that_fails_is_left_out_and_said_once(offline, monkeypatch):
    monkeypatch.setitem(WRITERS, "wandb", Broken)
    said = []
    track("wandb", offline, said=said)
    assert said == ["wandb failed, and is told nothing more of this run: gone away"]


def test_one_that_can_t_be_reached_is_one_line(offline, monkeypatch):
    monkeypatch.setitem(WRITERS, "wandb", Broken)
    monkeypatch.setattr(writers, "_name_of", lambda run, step: "refuse")
    with pytest.raises(UserError, match="`log_to` wandb can't be used: no server"):
        track("wandb", offline)
    assert list(offline.iterdir()) == []


def test_a_tensorboard_that_can_t_be_imported_is_refused_where_it_is_asked_for(offline, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="`log_to` tensorboard can't be used: "):
        track("tensorboard", offline)
    said = []
    track(None, offline, said=said)
    assert said == []


def test_unknown_and_missing_ones_are_refused_before_a_run_begins(monkeypatch):
    check_trackers(None)
    with pytest.raises(
        UserError, match="unknown log to 'neptune': choose of tensorboard, wandb, mlflow, trackio, comet"
    ):
        check_trackers("neptune")
    monkeypatch.setattr(writers, "find_spec", lambda name: None if name == "comet_ml" else "there")
    with pytest.raises(UserError, match=r"`log_to` comet is not installed: pip install 'sparse-fcmae\[comet\]'"):
        check_trackers("mlflow,comet")
