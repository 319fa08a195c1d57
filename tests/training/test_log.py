import json
import math
import os
import re
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from sparse_fcmae import UserError
from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.evaluation.verdict import Verdict
from sparse_fcmae.training import log as module
from sparse_fcmae.training.log import BAR, RunLog, in_notebook
from sparse_fcmae.training.plots import draw_loss


def rows(run, name="metrics"):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def log_of(run, step=0, main=True):
    return RunLog(run, step, 10, main)


def test_a_row_for_each_step_and_each_evaluation(tmp_path):
    log = log_of(tmp_path)
    log.steps(3, 4, [0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [1e-3, 2e-3, 3e-3], images=30)
    log.evaluation(3, 0.75, {"top1": 0.5, "loss": 2.0})
    log.sync()
    assert [(r["step"], r["epoch"], r["loss"], r["lr"]) for r in rows(tmp_path)] == [
        (1, 0.25, 0.5, 1e-3),
        (2, 0.5, 0.25, 2e-3),
        (3, 0.75, 0.125, 3e-3),
    ]
    assert len({r["images_per_second"] for r in rows(tmp_path)}) == 1
    assert rows(tmp_path, "evaluations") == [{"step": 3, "epoch": 0.75, "top1": 0.5, "loss": 2.0}]
    log.close()
    text = (tmp_path / "train.log").read_text()
    assert "step 3, loss 0.1250" in text
    assert "step 3, epoch 0.75: top1 50.00 %, loss 2.0000" in text


def test_a_resumed_run_goes_on_without_a_seam(tmp_path):
    log = log_of(tmp_path)
    log.evaluation(0, 0.0, {"top1": 0.1})
    log.steps(6, 2, [float(i) for i in range(6)], [float(i) for i in range(6)], [0.0] * 6, images=6)
    log.evaluation(2, 1.0, {"top1": 0.2})
    log.evaluation(6, 3.0, {"top1": 0.3})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # a process that was killed while it wrote
    log = log_of(tmp_path, step=4)
    log.steps(5, 2, [50.0], [50.0], [0.0], images=1)
    log.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 50)]
    assert [r["step"] for r in rows(tmp_path, "evaluations")] == [0, 2]
    log_of(tmp_path, step=0).close()
    assert rows(tmp_path) == rows(tmp_path, "evaluations") == []


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN and no infinity, and other readers stop there."""
    log = log_of(tmp_path)
    log.steps(3, 4, [1.0, math.nan, math.inf], [math.inf, 2.0, math.nan], [0.1] * 3, images=2)
    log.evaluation(3, 1.0, {"top1": 0.5, "loss": math.nan})
    log.close()
    assert [(row["loss"], row["grad_norm"]) for row in rows(tmp_path)] == [(1.0, None), (None, 2.0), (None, None)]
    assert rows(tmp_path, "evaluations")[-1]["loss"] is None
    for name in ("metrics", "evaluations"):
        assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (tmp_path / f"{name}.jsonl").read_text()))
    draw_loss(tmp_path, "loss", "loss")
    assert (tmp_path / "loss.png").is_file()


def test_other_ranks_write_nothing(tmp_path):
    log = log_of(tmp_path, main=False)
    log.say("hello")
    log.steps(1, 4, [1.0], [1.0], [0.1], images=1)
    log.sync()
    log.close()
    assert not list(tmp_path.iterdir())


def test_curves_are_left_out_where_matplotlib_is_missing(tmp_path):
    def draw():
        raise ImportError

    log = log_of(tmp_path)
    log.draw(draw)
    log.close()
    assert "no curve is drawn, as matplotlib is not installed (extra: plots)" in (tmp_path / "train.log").read_text()


class Writer:
    """As much of TensorBoard's writer as is used."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def test_speed_is_of_training_without_evaluating(tmp_path, clock):
    log = RunLog(tmp_path, 0, 10, main=True)
    clock.now += 2
    log.steps(2, 5, [1.0, 1.0], [1.0, 1.0], [0.1, 0.1], images=30)
    clock.now += 1000
    log.evaluation(2, 0.4, {"top1": 0.5})
    clock.now += 4
    log.steps(3, 5, [1.0], [1.0], [0.1], images=30)
    log.close()
    assert [row["images_per_second"] for row in rows(tmp_path)] == [15.0, 15.0, 7.5]
    assert "step 3, loss 1.0000, 7.5 images/s, lr 1.00e-01" in (tmp_path / "train.log").read_text()


def test_waiting_for_images_is_said(tmp_path, clock):
    log = RunLog(tmp_path, 0, 10, main=True)
    clock.now += 2
    log.steps(1, 5, [1.0], [1.0], [0.1], images=30, waited=0.05)
    clock.now += 4
    log.steps(2, 5, [1.0], [1.0], [0.1], images=30, waited=3.0)
    log.close()
    assert [row["data_wait"] for row in rows(tmp_path)] == [0.025, 0.75]
    first, second = (tmp_path / "train.log").read_text().splitlines()
    assert first.endswith("lr 1.00e-01")
    assert second.endswith("lr 1.00e-01, 75% waiting for images")


@pytest.fixture
def watched(monkeypatch):
    """Has the process print into a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_the_bar_has_room_in_80_columns():
    """With a million steps, days to go, and a wait."""
    status = "loss 0.9869, 12345.6 images/s"
    shown = tqdm.format_meter(1_000_000, 1_200_000, 400_000, ncols=80, bar_format=BAR, postfix=status)
    assert len(shown) <= 80
    assert shown.endswith(f"{status}]")
    assert "1000000/1200000" in shown


def test_a_line_now_and_then_where_nobody_watches(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 10, main=True)
    log.steps(2, 5, [1.0, 0.5], [1.0, 0.5], [0.1, 0.1], images=30)
    log.close()
    out, errors = capsys.readouterr()
    assert re.fullmatch(r"step 2, loss 0.5000, [\d.]+ images/s, lr 1.00e-01\n", out)
    assert errors == ""


def test_a_notebook_has_a_bar(tmp_path, monkeypatch):
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook()
    log = RunLog(tmp_path, 0, 10, main=True)
    assert not log.bar.disable
    log.close()


def test_the_bar_goes_on_where_the_run_does(tmp_path, watched):
    log = RunLog(tmp_path, 4, 10, main=True)
    assert (log.bar.n, log.bar.total) == (4, 10)
    log.steps(6, 5, [1.0, 0.5], [1.0, 0.5], [0.1, 0.1], images=30)
    assert log.bar.n == 6
    assert "loss 0.5000" in log.bar.postfix
    log.close()
    assert log.bar.disable
    assert not (tmp_path / "evaluations.jsonl").exists()


def test_lines_go_above_the_bar_too(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 10, main=True)
    log.say("café is closed")
    log.close()
    assert "café is closed" in capsys.readouterr().out.splitlines()
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith(" café is closed\n")


def test_tensorboard_gets_what_the_files_get(tmp_path, clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    log = RunLog(tmp_path, 4, 10, main=True)
    writer = log.writers.chosen["tensorboard"].writer
    assert (writer.folder, writer.purge_step) == (str(tmp_path), 5)
    clock.now += 2
    log.steps(5, 5, [1.0], [1.0], [0.1], images=30)
    log.evaluation(5, 1.0, {"top1": 0.5, "loss": 2.0})
    assert writer.scalars == [
        ("loss", 1.0, 5),
        ("grad_norm", 1.0, 5),
        ("lr", 0.1, 5),
        ("images_per_second", 15.0, 5),
        ("data_wait", 0.0, 5),
        ("top1", 0.5, 5),
        ("loss", 2.0, 5),
    ]
    log.close()
    assert writer.closed
    assert RunLog(tmp_path, 4, 10, main=False).writers.chosen == {}


def test_tensorboard_may_be_missing_or_broken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace())
    log = RunLog(tmp_path, 0, 10, main=True)
    assert log.writers.chosen == {}
    log.steps(1, 5, [1.0], [1.0], [0.1], images=3)
    log.evaluation(1, 0.2, {"top1": 0.5})
    log.close()
    assert len(rows(tmp_path)) == 1


def test_an_image_that_is_left_out_is_named_once(tmp_path):
    log = RunLog(tmp_path, 0, 10, main=True)
    log.say_left_out([BadImage("a.png", "cut"), BadImage("b.png", "empty")])
    log.say_left_out([BadImage("b.png", "empty"), BadImage("c.png", "cut")])
    log.close()
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("evaluation: ")[1] for line in lines] == ["a.png: cut", "b.png: empty", "c.png: cut"]


def test_lines_that_are_no_rows_are_left_out_and_said(tmp_path):
    for line in (b"nonsense", b'{"loss": 1}', b"[1]", b"\xff", b'{"step": "2"}', b"\0" * 40, b""):
        (tmp_path / "train.log").unlink(missing_ok=True)
        rows = [b'{"step": 1, "loss": 2.5}\n', line + b"\n", b'{"step": 3}\n', b'{"step": 4}\n', b'{"step": 2']
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(rows))
        RunLog(tmp_path, 3, 10, main=True).close()
        assert (tmp_path / "metrics.jsonl").read_bytes() == rows[0] + rows[2]
        assert "metrics.jsonl, as they are no rows: 1 line\n" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("evaluates", [True, False])
def test_rows_reach_the_disk_before_a_checkpoint_relies_on_them(tmp_path, monkeypatch, evaluates):
    log, synced = RunLog(tmp_path, 0, 10, main=True), []
    if evaluates:
        log.evaluation(1, 0.1, {"top1": 0.5})
    monkeypatch.setattr(module.os, "fsync", synced.append)
    log.sync()
    assert synced == [file.fileno() for file in (log.metrics, log.evaluations) if file]
    assert len(synced) == 1 + evaluates
    log.close()
    silent = RunLog(tmp_path, 0, 10, main=False)
    silent.sync()
    silent.close()
    assert len(synced) == 1 + evaluates


def test_files_are_closed_and_other_ranks_have_none(tmp_path):
    log = RunLog(tmp_path, 0, 10, main=True)
    log.evaluation(1, 0.1, {"top1": 0.5})
    log.sync()
    log.close()
    assert log.metrics.closed
    assert log.evaluations.closed
    assert log.text.closed
    silent = RunLog(tmp_path / "none", 0, 10, main=False)
    silent.evaluation(1, 0.1, {"top1": 0.5})
    silent.say_left_out([BadImage("a.png", "cut")])
    silent.close()
    assert not (tmp_path / "none").exists()


def test_files_that_can_not_be_closed_are_no_second_error(tmp_path):
    log = log_of(tmp_path)
    log.evaluation(1, 1, {"top1": 0.5})
    for file in (log.metrics, log.evaluations, log.text):
        file.close()

    class Full:
        def write(self, text=""):
            raise OSError(28, "No space left on device")

        close = write

    log.metrics, log.evaluations, log.text = Full(), Full(), Full()
    with pytest.raises(UserError, match="No space left on device"):
        log.steps(1, 1, [0.5], [0.5], [1e-3], images=1)
    with pytest.raises(UserError, match="No space left on device"):
        log.say("hello")
    log.close()


def test_a_run_goes_on_where_nobody_reads_what_it_says(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as output:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", output)
        log = log_of(tmp_path)
        os.close(reading)
        log.say("hello")
        log.steps(1, 1, [0.5], [0.5], [1e-3], images=1)
        log.close()
    assert "hello" in (tmp_path / "train.log").read_text()
    assert [row["loss"] for row in rows(tmp_path)] == [0.5]


def test_a_verdict_is_said_and_stays_in_the_bar(tmp_path, watched):
    log = log_of(tmp_path)
    log.verdict(None)
    log.steps(1, 4, [0.5], [0.5], [1e-3], images=10)
    assert "learning" not in log.bar.postfix
    log.evaluation(1, 0.25, {"val_loss": 0.5, "effective_rank": 40.25, "distance_1.1": 0.3})
    log.verdict(Verdict("learning", "it fills in more"))
    assert "images/s, learning" in log.bar.postfix
    log.steps(2, 4, [0.5], [0.5], [1e-3], images=10)
    assert "images/s, learning" in log.bar.postfix
    log.close()
    said = [line.split(" ", 2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert said[1:3] == ["step 1, epoch 0.25: val_loss 0.5000, effective_rank 40.2500", "learning: it fills in more"]
    assert rows(tmp_path, "evaluations")[0]["distance_1.1"] == 0.3


def test_an_evaluation_of_nothing_leaves_no_file(tmp_path):
    log = log_of(tmp_path)
    log.evaluation(1, 0.25, {})
    log.close()
    assert not (tmp_path / "evaluations.jsonl").exists()
