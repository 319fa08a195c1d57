"""The loop with a task of this file's own, which knows nothing of masks or classes."""

import json
import shutil
import signal
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_fcmae.data.batches import TrainingImages
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import RandomView
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import Interrupted
from sparse_fcmae.runtime.options import option
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.configure import configure
from sparse_fcmae.training.loop import train
from sparse_fcmae.training.task import Task


@dataclass(frozen=True, kw_only=True)
class ColourConfig(RunConfig):
    task: ClassVar[str] = "colour"

    data: str | None = option(None, help="images", path=True, resumable=True)
    out: str = option("runs/colour", help="folder", path=True, resumable=True)
    init: str | None = option(None, help="weights", path=True)
    image_size: str = option("8", help="pixels")
    epochs: int = option(2, help="passes", above=0)
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
    evaluates = evaluates_untrained = True
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
        return TrainingImages(self.source, RandomView((8, 8), 3), self.config.seed)

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

    def evaluate(self, log):
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
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


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
    assert "a layer; 40 images, 10 a step, 4 steps an epoch, 8 in all" in log
    assert "a note" in log
    assert "a checkpoint every 3 steps" in log


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_stopped_and_resumed_run_ends_as_an_uninterrupted_one(pictures, whole, tmp_path, steps):
    events = run(pictures, tmp_path / "run", stop_after=steps, save_every=100)
    assert events[-2:] == [("illustrate", steps), "interrupted"]
    assert f"stopped at step {steps}: resume the run in" in (tmp_path / "run" / "train.log").read_text()
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


def test_a_run_without_a_checkpoint_begins_again(pictures, whole, tmp_path):
    run(pictures, tmp_path / "run", stop_after=3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(pictures, tmp_path / "run", resume=True)
    assert "no checkpoint to resume from: starting at step 0" in (tmp_path / "run" / "train.log").read_text()
    for name in ("metrics", "evaluations"):
        assert rows(tmp_path / "run", name) == rows(whole[0], name)
