from types import SimpleNamespace

import pytest
import torch

from sparse_fcmae import UserError
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.training import checkpoint
from sparse_fcmae.training.checkpoint import Checkpoints


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: time.now)
    return time


def checkpoints(run=None, model=None, asked_for=None, interval=5, start=0):
    config = SimpleNamespace(save_every=asked_for, keep_checkpoints=3)
    drawn = []
    task = SimpleNamespace(
        config=config,
        model=model,
        source=SimpleNamespace(fingerprint="f"),
        state=lambda: {"own": torch.ones(1)},
        illustrate=lambda run, step: drawn.append(step),
        drawn=drawn,
    )
    schedule = SimpleNamespace(save_every=asked_for or interval, steps=23)
    optimizer = SimpleNamespace(state_dict=lambda: {})
    log = SimpleNamespace(sync=lambda: None)
    return Checkpoints(run, task, optimizer, schedule, log, {}, start)


def test_without_a_wish_steps_and_a_minute_have_to_go_by(clock):
    saved = checkpoints(start=10)
    clock.now = 59.9
    assert not saved.due(15)
    clock.now = 60.0
    assert saved.due(15)
    assert not saved.due(14)
    assert [step for step in range(1, 24) if saved.asked_for(step)] == [23]
    assert str(saved) == "a checkpoint every 5 steps, but at most one a minute (--save-every N: every N steps)"


def test_with_a_wish_the_time_does_not_matter(clock):
    saved = checkpoints(asked_for=4)
    clock.now = 1e6
    assert not any(saved.due(step) for step in range(24))
    assert [step for step in range(1, 24) if saved.asked_for(step)] == [4, 8, 12, 16, 20, 23]
    assert str(saved) == "a checkpoint every 4 steps"
    assert str(checkpoints(asked_for=1)) == "a checkpoint every step"


def test_the_minute_begins_anew_with_each_checkpoint(clock, tmp_path):
    run = RunFolder(tmp_path, "juggling")
    run.checkpoints.mkdir()
    saved = checkpoints(run, torch.nn.Linear(2, 2))
    clock.now = 100.0
    saved.save(5)
    assert not saved.due(10)
    clock.now = 160.0
    assert saved.due(10)
    assert saved.task.drawn == [5]
    assert checkpoint.load_trainer(run.checkpoints / "step-00000005")["own"].tolist() == [1]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = RunFolder(tmp_path, "juggling")
    run.checkpoints.mkdir()
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(UserError, match="the weights are not finite after step 5: lower `lr` or give `clip_grad=1`"):
        checkpoints(run, model).save(5)
    assert not list(run.checkpoints.iterdir())
