import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparse_fcmae import UserError
from sparse_fcmae.runtime.checkpoint_folder import newest_checkpoint
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.training import checkpoint, checkpoint_files
from sparse_fcmae.training.best import Best
from sparse_fcmae.training.checkpoint import Checkpoints, restore
from sparse_fcmae.training.checkpoint_files import Keep, load_trainer, write_checkpoint
from sparse_fcmae.training.optim import adamw


def test_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    write_checkpoint(checkpoints, 12, {}, {"step": 12, "images": "these"}, Keep(3))
    monkeypatch.setattr(checkpoint_files, "save_tensors", full)
    with pytest.raises(UserError, match=r"can't write .*step-00000016: No space left on device"):
        write_checkpoint(checkpoints, 16, {}, {}, Keep(3))
    assert newest_checkpoint(tmp_path).name == "step-00000012"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-00000012"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: time.now)
    return time


def checkpoints(run=None, model=None, asked_for=None, interval=5, start=0, minutes=None):
    config = SimpleNamespace(save_every=asked_for, save_minutes=minutes, keep_checkpoints=3, keep_every=None)
    drawn = []
    task = SimpleNamespace(
        config=config,
        ranks=Ranks(0, 1, torch.device("cpu")),
        model=model,
        source=SimpleNamespace(fingerprint="f"),
        state=lambda: {"own": torch.ones(1)},
        illustrate=lambda run, step: drawn.append(step),
        drawn=drawn,
    )
    schedule = SimpleNamespace(save_every=asked_for or interval, steps=23)
    optimizer = SimpleNamespace(state_dict=lambda: {})
    log = SimpleNamespace(sync=lambda: None)
    best = Best(SimpleNamespace(monitor=None, patience=None), ())
    return Checkpoints(run, task, optimizer, schedule, log, {}, start, best)


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


def test_minutes_that_were_asked_for(clock):
    saved = checkpoints(minutes=2.0)
    clock.now = 119.0
    assert not saved.due(1)
    clock.now = 120.0
    assert saved.due(1)
    assert str(saved) == "a checkpoint every 2 minutes"
    both = checkpoints(minutes=0.5, asked_for=4)
    assert str(both) == "a checkpoint every 0.5 minutes and every 4 steps"
    assert both.asked_for(8)
    clock.now = 150.0
    assert both.due(5)


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
    saved.written()
    assert load_trainer(run.checkpoints / "step-00000005")["own"].tolist() == [1]


def test_steps_go_on_while_a_checkpoint_of_before_is_written(tmp_path, monkeypatch):
    run, going_on = RunFolder(tmp_path, "juggling"), threading.Event()
    run.checkpoints.mkdir()

    def slow(*arguments):
        assert going_on.wait(60)
        write_checkpoint(*arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    saved = checkpoints(run, model)
    saved.save(5)
    with torch.no_grad():
        model.weight.add_(1)
    saved.unreadable["x.png"] = "cut"
    going_on.set()
    saved.written()
    folder = run.checkpoints / "step-00000005"
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], before)
    assert load_trainer(folder)["bad"] == {}


def test_one_that_could_not_be_written_is_an_error_of_the_next(tmp_path):
    run = RunFolder(tmp_path / "gone", "juggling")
    saved = checkpoints(run, torch.nn.Linear(2, 2))
    run.path.write_text("a file where the folder should be")
    saved.save(5)
    with pytest.raises(UserError, match=r"can't write .*gone.*step-00000005: Not a directory"):
        saved.save(10)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = RunFolder(tmp_path, "juggling")
    run.checkpoints.mkdir()
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(UserError, match="the weights are not finite after step 5: lower `lr` or give `clip_grad=1`"):
        checkpoints(run, model).save(5)
    assert not list(run.checkpoints.iterdir())


class Juggling:
    """As much of a task as `restore` asks for."""

    def __init__(self, features=3, fingerprint="these"):
        self.model = nn.Linear(3, features)
        self.source = SimpleNamespace(fingerprint=fingerprint)
        self.config = SimpleNamespace(data="IMAGES", out="RUN")
        self.taken = None

    def state(self):
        return {"balls": 5}

    def load_state(self, state):
        self.taken = state["balls"]


def trained():
    """A task after two steps, and its optimiser."""
    task = Juggling()
    optimizer = adamw(task.model, 0.1, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        task.model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return task, optimizer


def write(checkpoints, task, optimizer, step=2, keep=3, every=None, **changes):
    checkpoints.mkdir(exist_ok=True)
    trainer = {"step": step, "optimizer": optimizer.state_dict(), "bad": {"x.png": "cut"}, "images": "these"}
    write_checkpoint(checkpoints, step, task.model.state_dict(), trainer | {"balls": 5} | changes, Keep(keep, every))
    return checkpoints / f"step-{step:08d}"


def test_a_step_after_a_checkpoint_is_the_step_that_it_would_have_been(tmp_path):
    task, optimizer = trained()
    folder = write(tmp_path / "checkpoints", task, optimizer)
    again = Juggling()
    other = adamw(again.model, 0.1, (0.9, 0.95))
    assert restore(folder, again, other) == (2, {"x.png": "cut"})
    assert again.taken == 5
    x = torch.randn(4, 3)
    for model, steps in ((task.model, optimizer), (again.model, other)):
        for group in steps.param_groups:
            group["lr"] = 0.1
        model(x).square().mean().backward()
        steps.step()
    assert torch.equal(again.model.weight, task.model.weight)
    assert torch.equal(again.model.bias, task.model.bias)


def test_a_run_on_other_images_is_refused_before_anything_is_loaded(tmp_path):
    folder = write(tmp_path / "checkpoints", *trained())
    task = Juggling(fingerprint="others")
    before = task.model.weight.clone()
    with pytest.raises(UserError, match="the images in IMAGES are not those that the run in RUN was started with"):
        restore(folder, task, adamw(task.model, 0.1, (0.9, 0.95)))
    assert torch.equal(task.model.weight, before)
    assert task.taken is None


def test_a_trainer_that_lacks_something_is_damaged(tmp_path):
    folder = write(tmp_path / "checkpoints", *trained())
    trainer = torch.load(folder / "trainer.pt", weights_only=True)
    del trainer["images"]
    torch.save(trainer, folder / "trainer.pt")
    with pytest.raises(UserError, match=r"is damaged: trainer.pt: it lacks images; delete its folder to go on"):
        restore(folder, Juggling(), adamw(Juggling().model, 0.1, (0.9, 0.95)))


def test_a_checkpoint_of_another_model_or_optimiser_is_refused(tmp_path):
    task, optimizer = trained()
    folder = write(tmp_path / "checkpoints", task, optimizer)
    wider = Juggling(features=4)
    with pytest.raises(UserError, match="is of another model: size mismatch for bias") as error:
        restore(folder, wider, adamw(wider.model, 0.1, (0.9, 0.95)))
    assert "\n" not in str(error.value)
    one_group = Juggling()
    with pytest.raises(UserError, match="the checkpoint's optimiser is another model's"):
        restore(folder, one_group, torch.optim.AdamW([{"params": one_group.model.parameters(), "lr_scale": 1.0}]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"nonsense" * 9),
        ("trainer.pt", b"nonsense" * 9),
        ("trainer.pt", b""),
    ],
)
def test_a_damaged_file_without_a_digest_is_named_with_the_way_back(tmp_path, name, content):
    write(tmp_path / "checkpoints", *trained(), step=1)
    folder = write(tmp_path / "checkpoints", *trained())
    (folder / name).write_bytes(content)
    task = Juggling()
    with pytest.raises(UserError, match=f"is damaged: {name}: .*delete its folder to go on from the one") as error:
        restore(folder, task, adamw(task.model, 0.1, (0.9, 0.95)))
    assert "\n" not in str(error.value)


def test_nothing_but_tensors_and_plain_values_is_unpickled(tmp_path):
    folder = write(tmp_path / "checkpoints", *trained())
    torch.save({"images": "these", "evil": print}, folder / "trainer.pt")
    task = Juggling()
    with pytest.raises(UserError, match=r"is damaged: trainer.pt: "):
        restore(folder, task, adamw(task.model, 0.1, (0.9, 0.95)))


def test_the_newest_stay_and_so_do_those_of_later_steps(tmp_path):
    checkpoints = tmp_path / "checkpoints"

    def there():
        return [int(p.name.removeprefix("step-")) for p in sorted(checkpoints.glob("step-*"))]

    for step in (10, 20, 30, 40):
        write(checkpoints, *trained(), step=step, keep=3)
    assert there() == [20, 30, 40]
    write(checkpoints, *trained(), step=30, keep=1)  # a run that went on from an earlier one
    assert there() == [30, 40]
    assert (checkpoints / "latest").read_text() == "step-00000030\n"


def test_those_of_every_so_many_steps_stay_too(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 15, 20, 30, 35, 40, 45):
        write(checkpoints, *trained(), step=step, keep=2, every=20)
    assert [p.name for p in sorted(checkpoints.glob("step-*"))] == [f"step-000000{step}" for step in (20, 40, 45)]
