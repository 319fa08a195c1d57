"""What the training loop asks of a task. A new objective is a subclass in one file of `tasks/`."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from sparse_fcmae.data.batches import Batch
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.training.config import RunConfig
from sparse_fcmae.training.log import RunLog, Verdict
from sparse_fcmae.training.schedule import Schedule
from sparse_fcmae.training.step import TrainStep


class Task(ABC):
    """A model, the images it is trained on, and its loss.

    Making a task reads its images and weights and raises UserError for what does not fit together; it writes nothing.

    config: without open ends, its dtype "fp32" or "bf16". ranks: the processes. source: the images that are trained on.
    model: what checkpoints hold, as `parallel.place` leaves it. ema: the moving average of its weights, where one is
    asked for. objective: a module whose forward takes the tensors of `inputs` and gives their mean loss. description:
    what is trained, where and how, in a line. notes: what else the log says at the start, a line each. outputs: the
    names of the files and folders in the run's folder that the task makes, beside `exported`. step_type: how steps run.
    min_lr: the learning rate at the end of the cosine. measures: the names of the values of `evaluate` that `monitor`
    may name. judge: a digest of the images that these are measured on. evaluates, evaluates_untrained: whether
    `evaluate` is called after the steps that the schedule says, and before the first step. divides: whether
    micro-batches may be divided where they do not fit into memory. flops: of an image's forward and backward pass, 0
    where they are not known.
    """

    config: RunConfig
    ranks: Ranks
    source: ImageSource
    model: nn.Module
    objective: nn.Module
    description: str
    notes: list[str]
    ema: AveragedModel | None = None
    outputs: ClassVar[tuple[str, ...]] = ()
    step_type: type[TrainStep] = TrainStep
    min_lr: float = 0.0
    measures: tuple[str, ...] = ()
    judge: str = ""
    evaluates: bool = False
    evaluates_untrained: bool = False
    divides: bool = True
    flops: float = 0.0

    @abstractmethod
    def dataset(self) -> Dataset:
        """The samples by keys (epoch, index), as `data.batches.TrainingImages` has them."""

    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimiser of the model's parameters."""

    @abstractmethod
    def inputs(self, batch: Batch, step: int, first: int) -> tuple[Tensor, ...]:
        """What the objective takes of a micro-batch.

        step: counted from 0. first: the micro-batch's first image among the rank's images of this step. Whatever is
        drawn at random follows from the seed, the step and the image's place in the global batch.
        """

    def after_step(self) -> None:
        """Is called once the optimiser has changed the weights."""
        if self.ema:
            self.ema.update_parameters(self.model)

    def beside_config(self) -> dict[str, Any]:
        """Entries that config.json has beside the options."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the task needs, beside the model and the optimiser, to go on from a checkpoint."""
        return {"ema": self.ema.state_dict()} if self.ema else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        if self.ema:
            self.ema.load_state_dict(state["ema"])

    def plan(self, schedule: Schedule) -> None:
        """Is told the plan of the run before anything is written. All ranks call it together."""

    def evaluate(self, log: RunLog, step: int) -> dict[str, float]:
        """What is measured of the model after so many steps. All ranks call it together."""
        raise NotImplementedError("a task that evaluates says how")

    def verdict(self, run: Path) -> Verdict | None:
        """Whether the run in a folder goes well, after an evaluation. The main rank alone calls it."""
        return None

    def illustrate(self, run: Path, step: int) -> None:
        """Draws into the run's folder what the model does, at each checkpoint. All ranks call it together."""

    @abstractmethod
    def export(self, run: Path, log: RunLog) -> None:
        """Writes the trained model for its users into RUN/exported, and logs how to use it.

        All ranks call it together, and the main one writes.
        """
