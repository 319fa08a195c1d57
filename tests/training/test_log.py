import json
import math

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.training.log import RunLog


def rows(run, name="metrics"):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def log_of(run, step=0, main=True, evaluates=True):
    return RunLog(run, step, 10, main, evaluates)


def test_a_row_for_each_step_and_each_evaluation(tmp_path):
    log = log_of(tmp_path)
    log.steps(3, 4, [0.5, 0.25, 0.125], [1e-3, 2e-3, 3e-3], images=30)
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
    log.steps(6, 2, [float(i) for i in range(6)], [0.0] * 6, images=6)
    log.evaluation(2, 1.0, {"top1": 0.2})
    log.evaluation(6, 3.0, {"top1": 0.3})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # a process that was killed while it wrote
    log = log_of(tmp_path, step=4)
    log.steps(5, 2, [50.0], [0.0], images=1)
    log.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 50)]
    assert [r["step"] for r in rows(tmp_path, "evaluations")] == [0, 2]
    log_of(tmp_path, step=0).close()
    assert rows(tmp_path) == rows(tmp_path, "evaluations") == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_written_down_and_ends_the_run(tmp_path, loss):
    log = log_of(tmp_path)
    with pytest.raises(UserError, match=f"the loss is {loss} at step 2: lower `lr` or `base_lr`, or give"):
        log.steps(2, 4, [1.0, loss], [0.1, 0.1], images=2)
    log.close()
    assert len(rows(tmp_path)) == 2


def test_other_ranks_write_nothing(tmp_path):
    log = log_of(tmp_path, main=False)
    log.say("hello")
    log.steps(1, 4, [1.0], [0.1], images=1)
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
