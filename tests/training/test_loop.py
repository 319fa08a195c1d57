"""The loop with a task of this file's own, which knows nothing of masks or classes."""

import io
import json
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from helpers import OF_MACHINE, go_back
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_fcmae import UserError
from sparse_fcmae.data.batches import TrainingImages
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import RandomView
from sparse_fcmae.runtime.checkpoint_folder import best_checkpoint, newest_checkpoint
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import Interrupted
from sparse_fcmae.runtime.options import option
from sparse_fcmae.training import checkpoint, signals, waiting, writers
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.configure import configure
from sparse_fcmae.training.log import RunLog
from sparse_fcmae.training.loop import train
from sparse_fcmae.training.step import StepResult
from sparse_fcmae.training.task import Task
from sparse_fcmae.training.writers import Writer


@dataclass(frozen=True, kw_only=True)
class ColourConfig(RunConfig):
    kind: ClassVar[str] = "colour"
    command: ClassVar[str] = "paint"

    data: str | None = option(None, help="images", path=True, resumable=True)
    out: str = option("runs/colour", help="folder", path=True, resumable=True)
    init: str | None = option(None, help="weights", path=True)
    image_size: str = option("8", help="pixels")
    epochs: int = option(2, help="passes", above=0, changes_run=True)
    batch_size: int = option(10, help="images a step", above=0)
    micro_batch_size: int = option(4, help="images at once", above=0)
    warmup_epochs: float = option(0.0, help="epochs")
    base_lr: float | None = option(None, help="rate")
    lr: float | None = option(0.01, help="rate")
    clip_grad: float | None = option(None, help="norm")
    seed: int = option(0, help="seed")
    eval_every: int = option(1, help="epochs")
    dtype: str = option("fp32", help="dtype")


class MeanSquare(nn.Module):
    """How far a linear layer is from giving the mean colour of an image, from its first pixel and some noise."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, pixels, noise):
        pixels = pixels.float() / 255
        return (self.layer(pixels[:, 0, 0]) + 0.1 * noise - pixels.mean((1, 2))).square().mean()


class Colour(Task):
    measures, evaluates, evaluates_untrained = ("size_loss",), True, True
    outputs = ("steps.txt",)

    def __init__(self, config, events):
        self.config, self.events = config, events
        self.ranks = Ranks(0, 1, torch.device("cpu"))
        self.source = ImageFolder(config.data)
        torch.manual_seed(config.seed)
        self.model = nn.Linear(3, 3)
        self.objective = MeanSquare(self.model)
        self.description, self.notes = "a layer", ["a note"]
        self.steps = 0

    def dataset(self):
        return TrainingImages(self.source, RandomView((8, 8)), self.config.seed)

    def optimizer(self):
        return torch.optim.AdamW([{"params": list(self.model.parameters()), "lr_scale": 1.0, "capturable": False}])

    def inputs(self, batch, step, first):
        self.events.append(("inputs", step, first, len(batch.pixels)))
        generator = torch.Generator().manual_seed(1000 * step + first)
        return batch.pixels, torch.randn(len(batch.pixels), 3, generator=generator)

    def after_step(self):
        self.steps += 1
        self.events.append(("after_step", self.steps))
        if self.stop_after == self.steps:
            signal.raise_signal(signal.SIGINT)

    stop_after = None

    def beside_config(self):
        return {"colours": 3}

    def state(self):
        return {"steps": self.steps}

    def load_state(self, state):
        self.steps = state["steps"]

    def evaluate(self, log, step):
        self.events.append(("evaluate", self.steps))
        return {"size_loss": self.model.weight.norm().item()}

    def illustrate(self, run, step):
        self.events.append(("illustrate", step))

    def export(self, run, log):
        self.events.append(("export", self.steps))
        (run / "exported").mkdir(exist_ok=True)
        save_file(self.model.state_dict(), run / "exported" / "model.safetensors")


def run(pictures, out, stop_after=None, **options):
    events = []
    task = Colour(
        configure(ColourConfig, {"data": str(pictures), "out": str(out), "num_workers": 0, **options}), events
    )
    task.stop_after = stop_after
    try:
        assert train(task) == out / "exported"
    except Interrupted:
        events.append("interrupted")
    return events


def rows(out, name):
    found = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_MACHINE} for row in found]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run of 8 steps, and what its task was asked for."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(pictures, out, save_every=3)


def test_a_task_is_asked_in_this_order(whole):
    out, events = whole
    expected = [("evaluate", 0)]
    for step in range(8):
        expected += [("inputs", step, first, size) for first, size in ((0, 4), (4, 4), (8, 2))]
        expected.append(("after_step", step + 1))
        if (step + 1) % 4 == 0:
            expected.append(("evaluate", step + 1))
        if step + 1 in (3, 6, 8):
            expected.append(("illustrate", step + 1))
    assert events == [*expected, ("export", 8)]
    assert [row["step"] for row in rows(out, "metrics")] == list(range(1, 9))
    assert [row["step"] for row in rows(out, "evaluations")] == [0, 4, 8]
    assert json.loads((out / "config.json").read_text())["colours"] == 3
    log = (out / "train.log").read_text()
    assert "a layer; 40 samples, 10 a step, 4 steps an epoch, 8 in all" in log
    assert "a note" in log
    assert "a checkpoint every 3 steps" in log


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_stopped_and_resumed_run_ends_as_an_uninterrupted_one(pictures, whole, tmp_path, steps):
    events = run(pictures, tmp_path / "run", stop_after=steps, save_every=100)
    assert events[-2:] == [("illustrate", steps), "interrupted"]
    to_go_on = f"stopped at step {steps}; to go on: sparse-fcmae paint --resume --out {tmp_path / 'run'}\n"
    assert to_go_on in (tmp_path / "run" / "train.log").read_text()
    events = run(pictures, tmp_path / "run", resume=True)
    assert events[0] == ("inputs", steps, 0, 4)
    assert ("evaluate", 0) not in events
    for name in ("metrics", "evaluations"):
        assert rows(tmp_path / "run", name) == rows(whole[0], name)
    ours, theirs = (load_file(r / "exported" / "model.safetensors") for r in (tmp_path / "run", whole[0]))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_finished_run_is_only_exported_again(pictures, tmp_path):
    run(pictures, tmp_path / "run")
    assert run(pictures, tmp_path / "run", resume=True) == [("export", 8)]
    assert "step-00000008, the run's last: only exporting again" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_whose_export_failed_is_not_finished(pictures, tmp_path, monkeypatch):
    """Not even where there is an export, of a shorter run."""
    out = tmp_path / "run"
    run(pictures, out, epochs=1)

    def full(self, run, log):
        raise UserError("No space left on device")

    export = Colour.export
    monkeypatch.setattr(Colour, "export", full)
    with pytest.raises(UserError, match="No space left"):
        run(pictures, out, resume="auto", epochs=2)
    monkeypatch.setattr(Colour, "export", export)
    assert run(pictures, out, resume="auto", epochs=2) == [("export", 8)]
    last = load_file(out / "checkpoints" / "step-00000008" / "model.safetensors")
    exported = load_file(out / "exported" / "model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in last.items())


def test_a_run_without_a_checkpoint_begins_again(pictures, whole, tmp_path):
    run(pictures, tmp_path / "run", stop_after=3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(pictures, tmp_path / "run", resume=True)
    assert "no checkpoint to resume from: starting at step 0" in (tmp_path / "run" / "train.log").read_text()
    for name in ("metrics", "evaluations"):
        assert rows(tmp_path / "run", name) == rows(whole[0], name)


@dataclass(frozen=True, kw_only=True)
class GreyConfig(RunConfig):
    kind: ClassVar[str] = "grey"
    command: ClassVar[str] = "brighten"

    data: str | None = option("MEMORY", help="images")
    out: str = option("runs/grey", help="folder")
    init: str | None = option(None, help="weights")
    image_size: str = option("8", help="pixels")
    epochs: int = option(3, help="passes")
    batch_size: int = option(5, help="images a step")
    micro_batch_size: int = option(2, help="images at once")
    warmup_epochs: float = option(0.0, help="epochs")
    base_lr: float | None = option(None, help="rate")
    lr: float | None = option(0.5, help="rate")
    clip_grad: float | None = option(7.0, help="norm")
    seed: int = option(0, help="seed")
    eval_every: int = option(100, help="epochs")
    dtype: str = option("fp32", help="dtype")
    num_workers: int | None = option(0, help="loaders")


class Memory:
    """A source of 20 images that are nowhere on the disk, some of which may be unreadable."""

    fingerprint = "20 images"

    def __init__(self, unreadable=()):
        self.unreadable = unreadable

    def __len__(self):
        return 20

    def __str__(self):
        return "MEMORY"

    def open(self, index):
        file = io.BytesIO()
        if index not in self.unreadable:
            Image.new("L", (8, 8), 10 * index).save(file, "PNG")
        file.seek(0)
        return file

    def name(self, index):
        return f"image {index}"


class Remembering:
    """Takes the place of a TrainStep. The loss of a step is its number."""

    most = 5

    def __init__(self, objective, optimizer, **options):
        self.optimizer, self.options, self.added, self.rates = optimizer, options, [], []
        objective.made.append(self)

    def add(self, *inputs, last):
        self.added.append((*(len(t) for t in inputs), last))

    def finish(self):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return StepResult(torch.tensor(float(len(self.rates))), torch.tensor(1.0))


class Short(Remembering):
    """Finds in its second step that two images at once are what fits."""

    def finish(self):
        self.most = 2 if self.rates else self.most
        return super().finish()


class Grey(Task):
    step_type = Remembering

    def __init__(self, out, source=None, **options):
        self.config, self.ranks = GreyConfig(out=str(out), **options), Ranks(0, 1, torch.device("cpu"))
        self.source, self.model = source or Memory(), nn.Linear(1, 1)
        self.objective, self.description, self.notes = SimpleNamespace(made=[]), "nothing", []
        self.min_lr = 0.1

    def dataset(self):
        return TrainingImages(self.source, RandomView((8, 8), Reading(1)), 0)

    def optimizer(self):
        return torch.optim.AdamW([{"params": list(self.model.parameters()), "lr_scale": 0.5, "capturable": False}])

    def inputs(self, batch, step, first):
        return (batch.pixels,)

    def export(self, run, log):
        pass


def lines(out):
    """What train.log says, without the time."""
    return [line[20:] for line in (out / "train.log").read_text().splitlines()]


def test_a_step_gets_all_its_micro_batches_and_is_told_the_last(tmp_path):
    task = Grey(tmp_path / "run")
    train(task)
    (step,) = task.objective.made
    assert step.options == {"images_per_rank": 5, "clip_grad": 7.0, "bf16": False, "divides": True}
    assert step.added == [(2, False), (2, False), (1, True)] * 12
    cosine = [0.1 + 0.4 * 0.5 * (1 + torch.tensor(torch.pi * i / 12).cos().item()) for i in range(12)]
    assert step.rates == pytest.approx([0.5 * rate for rate in cosine], rel=1e-6)


@pytest.mark.parametrize("micro", [5, 99])
def test_one_micro_batch_is_the_last(tmp_path, micro):
    task = Grey(tmp_path / "run", micro_batch_size=micro, epochs=1, dtype="bf16", clip_grad=None)
    train(task)
    (step,) = task.objective.made
    assert step.options == {"images_per_rank": 5, "clip_grad": None, "bf16": True, "divides": True}
    assert step.added == [(5, True)] * 4


@pytest.mark.parametrize(("log_every", "written"), [(1, range(1, 13)), (5, (1, 5, 10, 12)), (100, (1, 12))])
def test_the_log_has_the_first_step_every_so_many_and_the_last(tmp_path, log_every, written):
    train(Grey(tmp_path / "run", log_every=log_every))
    assert [int(line.split(",")[0][5:]) for line in lines(tmp_path / "run") if line.startswith("step ")] == [*written]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 12


def test_a_resumed_run_says_where_it_goes_on_and_logs_its_first_step(tmp_path):
    out = tmp_path / "run"
    train(Grey(out, save_every=4, keep_checkpoints=9, log_every=100))
    go_back(out, 4)
    (out / "train.log").unlink()
    train(Grey(out, save_every=4, log_every=100, resume=True))
    said = lines(out)
    assert said[0] == ("nothing; 20 samples, 5 a step, 4 steps an epoch, 12 in all, 0 of warm-up, peak lr 0.5")
    assert said[1] == f"resumed from {out / 'checkpoints' / 'step-00000004'}"
    assert said[2] == "a checkpoint every 4 steps"
    assert [line.split(",")[0] for line in said[3:-1]] == ["step 5", "step 8", "step 12"]
    assert said[-1].startswith("done: 8 steps in ")


def test_the_rows_of_a_checkpoints_steps_are_on_the_disk_before_it(tmp_path, monkeypatch):
    out, calls = tmp_path / "run", []
    write = checkpoint.write_checkpoint

    def sync(log):
        calls.append(("sync", len((out / "metrics.jsonl").read_text().splitlines())))

    def noted(folder, step, *arguments):
        calls.append(("write", step))
        write(folder, step, *arguments)

    monkeypatch.setattr(RunLog, "sync", sync)
    monkeypatch.setattr(checkpoint, "write_checkpoint", noted)
    train(Grey(out, save_every=7))
    assert calls == [("sync", 7), ("write", 7), ("sync", 12), ("write", 12)]


def test_a_checkpoint_that_is_due_does_not_wait_for_the_log(tmp_path, monkeypatch):
    minutes = iter(range(0, 10**6, 100))
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(minutes))
    train(Grey(tmp_path / "run", log_every=100))
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [int(folder.name[5:]) for folder in folders] == [4, 8, 12]


def test_unreadable_images_are_replaced_and_named(tmp_path):
    train(Grey(tmp_path / "run", Memory(unreadable=[3]), max_bad_images=0.05))
    named = [line for line in lines(tmp_path / "run") if line.startswith("unreadable")]
    assert len(named) == 1
    assert named[0].startswith("unreadable, replaced by another image: image 3: ")


def test_a_source_without_a_readable_image_ends_the_run_and_closes_its_log(tmp_path, monkeypatch):
    closed, close = [], RunLog.close
    monkeypatch.setattr(RunLog, "close", lambda log: (closed.append(1), close(log)))
    with pytest.raises(UserError, match=r"no readable image found in many tries: image .*; check `data`"):
        train(Grey(tmp_path / "run", Memory(unreadable=range(20))))
    assert closed == [1]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert lines(tmp_path / "run")[-1].startswith("no readable image found in many tries: image ")


class Failing(Memory):
    """A source that fails once, when an image is opened after so many others, and is well again afterwards."""

    def __init__(self, after, fail):
        super().__init__()
        self.left, self.fail = after, fail

    def open(self, index):
        self.left -= 1
        if self.left == 0:
            self.fail(self)
        return super().open(index)


@pytest.fixture
def undisturbed(tmp_path):
    """The rows of a run that nothing has disturbed, and its last rates."""
    train(Grey(tmp_path / "whole"))
    return [{k: row[k] for k in ("step", "lr")} for row in rows(tmp_path / "whole", "metrics")]


def goes_on(out, undisturbed, step):
    """Checks that a run has a checkpoint of a step alone, and ends as the undisturbed one when it is resumed."""
    assert [p.name for p in (out / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]
    train(Grey(out, resume=True))
    assert [{k: row[k] for k in ("step", "lr")} for row in rows(out, "metrics")] == undisturbed


def test_what_ends_a_run_early_is_logged_and_the_steps_that_are_done_are_saved(tmp_path, undisturbed):
    def break_down(source):
        source.unreadable = range(20)

    out = tmp_path / "run"
    with pytest.raises(UserError, match="no readable image found"):
        train(Grey(out, Failing(33, break_down), save_every=100))
    assert lines(out)[-1] == "no readable image found in many tries: image 5: no image of a known format; check --data"
    goes_on(out, undisturbed, 6)


def test_a_fault_of_the_program_is_logged_too(tmp_path, undisturbed):
    class Faulty(Grey):
        def inputs(self, batch, step, first):
            if step == 7:
                raise ZeroDivisionError("a fault")
            return (batch.pixels,)

    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        train(Faulty(out, save_every=100))
    assert lines(out)[-1] == "ZeroDivisionError('a fault')"
    goes_on(out, undisturbed, 7)


def test_a_run_that_waits_for_images_in_vain_stops_with_the_steps_that_are_done(tmp_path, monkeypatch, undisturbed):
    def hang(source):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    monkeypatch.setattr(waiting, "LONG", 0.1)
    monkeypatch.setattr(waiting, "LOOK", 0.05)
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Interrupted):
        train(Grey(out, Failing(33, hang), save_every=100))
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert "no images have come for 0 seconds: is MEMORY slow, or out of reach?" in lines(out)
    assert lines(out)[-2:] == [
        "stopped while waiting for images",
        f"stopped at step 6; to go on: sparse-fcmae brighten --resume --out {out}",
    ]
    goes_on(out, undisturbed, 6)


def test_a_loader_process_that_is_killed_is_reported_with_the_image(tmp_path, undisturbed):
    out = tmp_path / "run"
    source = Failing(3, lambda source: os.kill(os.getpid(), signal.SIGKILL))
    text = r"a process that loads images was killed while it read image \d+, or just after: if memory was short"
    with pytest.raises(UserError, match=text):
        train(Grey(out, source, num_workers=1))
    assert "killed while it read image" in lines(out)[-1]
    train(Grey(out, resume=True))
    assert [{k: row[k] for k in ("step", "lr")} for row in rows(out, "metrics")] == undisturbed


class Falling(Colour):
    """Measures what the test says."""

    measures = ("size_loss", "score")
    values: ClassVar = [3.0, 2.0, 1.0, 2.0, 2.5, 1.5, 1.7]

    def evaluate(self, log, step):
        return {"size_loss": self.values[self.steps // 4], "score": -self.values[self.steps // 4]}


def falling(pictures, out, **options):
    given = {"data": str(pictures), "out": str(out), "num_workers": 0, "epochs": 6, "save_every": 4, **options}
    task = Falling(configure(ColourConfig, given), [])
    train(task)
    return task


@pytest.mark.parametrize("monitor", ["size_loss", "score"])
def test_the_best_by_a_value_is_kept_and_exported(pictures, tmp_path, monitor):
    out = tmp_path / "run"
    falling(pictures, out, monitor=monitor, keep_checkpoints=2)
    kept = sorted(folder.name for folder in (out / "checkpoints").glob("step-*"))
    assert kept == ["step-00000008", "step-00000020", "step-00000024"]
    best = load_file(out / "checkpoints" / "step-00000008" / "model.safetensors")
    exported = load_file(out / "exported" / "model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in best.items())
    assert f"exporting the weights of step 8, the best by {monitor}: " in (out / "train.log").read_text()


def test_a_run_that_gets_no_better_stops_and_is_finished_then(pictures, tmp_path, capsys):
    out = tmp_path / "run"
    falling(pictures, out, monitor="size_loss", patience=2)
    assert [row["step"] for row in rows(out, "metrics")] == list(range(1, 17))
    why = "2 evaluations brought no better size_loss than 1.0000: raise --patience to go on"
    assert f"stopped: {why}" in (out / "train.log").read_text()
    before = (out / "exported" / "model.safetensors").read_bytes()
    falling(pictures, out, monitor="size_loss", patience=2, resume="auto")
    assert f"is finished: it is in {out / 'exported'} ({why})" in capsys.readouterr().out
    (out / "exported" / "model.safetensors").unlink()
    falling(pictures, out, resume=True)
    assert [row["step"] for row in rows(out, "metrics")] == list(range(1, 17))
    assert (out / "exported" / "model.safetensors").read_bytes() == before
    falling(pictures, out, resume=True, patience=9)  # a longer one goes on
    assert [row["step"] for row in rows(out, "metrics")] == list(range(1, 25))


def test_the_best_is_still_known_after_a_kill(pictures, tmp_path):
    out = tmp_path / "run"
    falling(pictures, out, monitor="size_loss", keep_checkpoints=9)
    go_back(out, 12)
    shutil.rmtree(out / "exported")
    falling(pictures, out, resume=True)
    best = load_file(out / "checkpoints" / "step-00000008" / "model.safetensors")
    exported = load_file(out / "exported" / "model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in best.items())


def test_a_damaged_best_is_said_and_the_last_is_exported(pictures, tmp_path):
    out = tmp_path / "run"
    falling(pictures, out, monitor="size_loss")
    (out / "checkpoints" / "step-00000008" / "trainer.pt").unlink()
    falling(pictures, out, resume=True)
    assert "is damaged, so the last one is exported: trainer.pt: No such" in (out / "train.log").read_text()
    last = load_file(out / "checkpoints" / "step-00000024" / "model.safetensors")
    exported = load_file(out / "exported" / "model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in last.items())


def test_metrics_say_what_the_machine_did_and_the_log_sums_it_up(tmp_path, monkeypatch):
    grey = Grey(tmp_path / "run", Memory(unreadable=[3]), max_bad_images=0.05, log_every=1)
    grey.flops = 2e9
    train(grey)
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in found:
        assert row["tflops"] == pytest.approx(2e9 * row["images_per_second"] / 1e12, rel=0.01, abs=1e-4)
        assert 0.1 < row["memory_gb"] < 100
        assert row["nonfinite"] == 0
        assert "mfu" not in row  # of a CPU no peak is known
    assert found[-1]["unreadable"] == 1
    assert re.search(
        r"done: 12 steps in \d+ s, [\d.]+ images/s with all that is around them.*, 1 unreadable image",
        (tmp_path / "run" / "train.log").read_text(),
    )


def test_a_tracker_is_told_of_steps_and_evaluations(pictures, tmp_path, monkeypatch):
    told = []

    class Told(Writer):
        def __init__(self, run, name, options, step):
            told.append((run.name, options["lr"], step))

        def rows(self, rows):
            told.extend((step, sorted(values)) for step, values in rows)

        def close(self):
            told.append("closed")

    monkeypatch.setitem(writers.WRITERS, "wandb", Told)
    monkeypatch.setattr(writers, "find_spec", lambda name: "there")
    run(pictures, tmp_path / "run", log_to="wandb", epochs=1, log_every=4)
    metrics = ["data_wait", "grad_norm", "images_per_second", "loss", "lr", "memory_gb", "nonfinite", "unreadable"]
    assert told == [
        ("run", 0.01, 0),
        (0, ["size_loss"]),
        *((step, metrics) for step in (1, 2, 3, 4)),
        (4, ["size_loss"]),
        "closed",
    ]


def test_images_that_were_swapped_under_their_names_are_said(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    run(data, tmp_path / "run", stop_after=3)
    first = sorted(data.rglob("*.png"))[0]
    first.write_bytes(sorted(data.rglob("*.png"))[-1].read_bytes())
    for _ in range(2):  # it stays true
        run(data, tmp_path / "run", resume=True)
        said = (tmp_path / "run" / "train.log").read_text()
        assert (
            f"of 16 images looked at, 1 have other contents than when the run began, such as {first.relative_to(data)}"
            in said
        )
        (tmp_path / "run" / "train.log").unlink()


class Fragile(Falling):
    """Fails in the evaluation after a step."""

    fails_at: ClassVar = None

    def evaluate(self, log, step):
        if self.steps == self.fails_at:
            raise OSError("gone")
        return super().evaluate(log, step)


def test_an_evaluation_that_failed_is_made_when_the_run_goes_on(pictures, tmp_path, monkeypatch):
    """No checkpoint is saved of a step whose evaluation is still to come."""
    given = {"data": str(pictures), "num_workers": 0, "epochs": 6, "save_every": 4, "monitor": "score"}
    train(Falling(configure(ColourConfig, given | {"out": str(tmp_path / "whole")}), []))
    monkeypatch.setattr(Fragile, "fails_at", 12)
    with pytest.raises(OSError, match="gone"):
        train(Fragile(configure(ColourConfig, given | {"out": str(tmp_path / "run")}), []))
    train(Falling(configure(ColourConfig, given | {"out": str(tmp_path / "run"), "resume": True}), []))
    for name in ("metrics", "evaluations"):
        assert rows(tmp_path / "run", name) == rows(tmp_path / "whole", name)
    one, other = (tmp_path / name / "exported" / "model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_what_ends_a_run_before_an_evaluation_leaves_that_to_the_run_that_goes_on(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    sorted(data.rglob("*.png"))[0].write_text("no image")
    given = {"data": str(data), "out": str(tmp_path / "run"), "num_workers": 0, "epochs": 1, "monitor": "score"}
    with pytest.raises(UserError, match="are unreadable"):
        train(Falling(configure(ColourConfig, given | {"max_bad_images": 0.0, "log_every": 100}), []))
    train(Falling(configure(ColourConfig, given | {"resume": True, "max_bad_images": 0.5}), []))
    assert [row["step"] for row in rows(tmp_path / "run", "evaluations")] == [0, 4]


def test_a_checkpoint_that_could_not_be_written_ends_the_run_soon(tmp_path, monkeypatch):
    """At the next look, and not at the next checkpoint, which may be an hour away."""

    def full(*arguments):
        raise UserError("can't write there: No space left on device")

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    out = tmp_path / "run"
    with pytest.raises(UserError, match="No space left on device"):
        train(Grey(out, save_every=3, max_steps=1000, log_every=1))
    assert len((out / "metrics.jsonl").read_text().splitlines()) < 6


def test_steps_or_epochs_may_be_given_anew_and_one_replaces_the_other(pictures, tmp_path):
    out = tmp_path / "run"
    run(pictures, out, max_steps=6)
    assert [row["step"] for row in rows(out, "metrics")][-1] == 6
    with pytest.raises(UserError, match="has done 6 steps, more than 5: raise `max_steps`"):
        run(pictures, out, resume=True, max_steps=5)
    run(pictures, out, resume=True, epochs=3)
    assert [row["step"] for row in rows(out, "metrics")][-1] == 12


def test_what_fits_into_memory_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Grey, "step_type", Short)
    train(Grey(tmp_path / "run", log_every=1))
    said = [line for line in lines(tmp_path / "run") if "at once" in line]
    assert said == ["2 images at once from here on, as more do not fit into the memory of cpu"]


def test_who_takes_a_runs_checkpoint_takes_its_best(pictures, tmp_path):
    falling(pictures, out := tmp_path / "run", monitor="score", keep_checkpoints=2)
    assert best_checkpoint(out).name == "step-00000008"
    assert newest_checkpoint(out).name == "step-00000024"
    (out / "checkpoints" / "step-00000008" / "trainer.pt").unlink()
    assert best_checkpoint(out).name == "step-00000024"
    falling(pictures, other := tmp_path / "other")
    assert best_checkpoint(other).name == "step-00000024"
    assert best_checkpoint(tmp_path / "none") is None
