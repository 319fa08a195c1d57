"""The learning-rate range test: rates, and what is seen in losses whose best rate is known."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import UserError, pretrain
from sparse_fcmae.tasks.config import PretrainConfig
from sparse_fcmae.training.lr_range import range_of_rates, what_it_showed
from sparse_fcmae.training.schedule import Schedule


def test_the_rate_rises_by_equal_factors():
    config = PretrainConfig(
        data="x", batch_size=10, epochs=5, warmup_epochs=1.0, lr=1.0, lr_range="1e-4,1", max_steps=5
    )
    schedule = Schedule.of(config, 100, 1)
    assert [schedule.lr(step) for step in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert str(schedule) == "10 a step, 5 steps of a range test, lr from 0.0001 to 1"


@pytest.mark.parametrize("value", ["1", "1,2,3", "a,b", "1,1", "2,1", "0,1", "1,inf", "nan,1", ""])
def test_what_is_no_range(value):
    with pytest.raises(UserError, match="give the first and the last learning rate, as 1e-6,1"):
        range_of_rates(value)


def test_the_steepest_descent_is_found(tmp_path):
    rates = np.geomspace(1e-6, 10, 200)
    losses = 1.0 - 0.6 / (1 + (1e-3 / rates) ** 2) + np.where(rates > 0.3, rates, 0)  # falls about 1e-3, rises from 0.3
    rows = [{"step": i + 1, "lr": lr, "loss": loss} for i, (lr, loss) in enumerate(zip(rates, losses, strict=True))]
    rows[50]["loss"] = None  # a step that was skipped
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, draw = what_it_showed(tmp_path)
    draw()
    steepest = float(said.split("--lr ")[1])
    assert 5e-4 < steepest < 5e-3  # the average lags a little behind
    Image.open(tmp_path / "lr-range.png").verify()


def test_too_few_steps_are_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"lr": 1.0, "loss": None}) + "\n")
    said, draw = what_it_showed(tmp_path)
    draw()
    assert said == "the range test has 0 steps with a finite loss, too few to tell: give --max-steps"


def test_a_loss_that_only_rises_is_said(tmp_path):
    rows = [json.dumps({"lr": 10.0 ** (step / 10 - 3), "loss": 1.0 + step}) for step in range(40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    said, _ = what_it_showed(tmp_path)
    assert said == "the loss never fell, from a rate of 0.001 on: give --lr-range a lower one to begin with"


OPTIONS = {"image_size": 32, "stem_stride": 1, "batch_size": 10, "device": "cpu", "num_workers": 0}


def test_a_test_that_goes_too_far_still_says_which_rate_to_try(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = OPTIONS | {"max_nonfinite": 3, "dtype": "fp32"}
    pretrain(data=pictures, out=tmp_path / "run", lr_range="1e-6,1e6", max_steps=60, **options)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "skipped, as loss or gradient were not finite" in log
    assert "try --lr " in log
    assert "no curve is drawn" in log
    assert (tmp_path / "run" / "exported" / "model.safetensors").is_file()


def test_a_run_says_which_rate_to_try(pictures, tmp_path):
    options = OPTIONS
    pretrain(data=pictures, out=tmp_path / "run", lr_range="1e-5,10", max_steps=40, **options)
    assert "try --lr " in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "run" / "lr-range.png").is_file()
