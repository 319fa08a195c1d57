import json
import os
import subprocess
import sys

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.cli import main
from sparse_fcmae.training.runs import runs


def made(folder, task="pretraining", rows=(), checkpoints=(), exported=False, epochs=3):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"format": f"sparse-fcmae {task} run", "epochs": epochs}))
    (folder / "metrics.jsonl").write_text("".join(rows))
    (folder / "train.log").write_text("x")
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir()
    if exported:
        (folder / "exported").mkdir()
        (folder / "exported" / "model.safetensors").touch()
    return folder


def row(step, loss=0.5):
    return json.dumps({"step": step, "epoch": step / 4, "loss": loss, "images_per_second": 123.4}) + "\n"


@pytest.fixture
def root(tmp_path):
    """Runs in every state, and folders that are none."""
    made(tmp_path / "a" / "done", rows=[row(4), row(12, 0.25)], checkpoints=[8, 12], exported=True)
    made(tmp_path / "b", "fine-tuning", rows=[row(6), '{"step": 7'], checkpoints=[4])
    made(tmp_path / "c")
    made(tmp_path / "d", rows=[row(5, None)], checkpoints=[])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{")
    (tmp_path / "b" / "exported" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "exported" / "config.json").write_text('{"format": "sparse-fcmae pretraining run"}')
    os.utime(tmp_path / "c" / "train.log", (0, 0))
    return tmp_path


def test_each_run_is_a_row(root):
    header, *lines = runs(folder=root).splitlines()
    assert header.split() == ["run", "task", "state", "step", "loss", "images/s", "last", "written"]
    assert [line.split()[0] for line in lines] == [str(root / name) for name in ("a/done", "b", "c", "d")]
    assert "pretraining  finished" in lines[0]
    assert lines[0].split()[3:8] == ["12", "of", "12", "0.2500", "123"]
    assert "fine-tuning  stopped, checkpoint at 4" in lines[1]
    assert "6 of 12" in lines[1]
    assert "stopped, no checkpoint" in lines[2]
    assert "days ago" in lines[2]
    assert lines[3].split()[-4:] == ["123", lines[3].split()[-3], "seconds", "ago"]


def test_a_run_that_another_process_works_on_is_running(root):
    program = (
        "import sys\nfrom pathlib import Path\nfrom sparse_fcmae.runtime.lock import lock_folder\n"
        f"held = lock_folder(Path({str(root / 'c')!r}))\nprint('locked', flush=True)\nsys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        assert "running" in runs(folder=root).splitlines()[3]
        process.stdin.close()
    assert "running" not in runs(folder=root)


def test_the_command_line(root, monkeypatch, capsys):
    main(["runs", str(root)])
    assert capsys.readouterr().out.count("\n") == 5
    root.rename(root.parent / "runs")
    monkeypatch.chdir(root.parent)
    main(["runs"])
    assert capsys.readouterr().out.count("\n") == 5


def test_no_runs(tmp_path):
    with pytest.raises(UserError, match="no run in this folder or below it"):
        runs(folder=tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        runs(folder=tmp_path / "x")
