"""Where the numbers of a run go beside its own files: a small class for each experiment tracker.

What a tracker is told besides, such as its server, its keys or that it is offline, it reads from its own environment
variables. A tracker that fails is left out for the rest of the run, which goes on.
"""

import math
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import time
from typing import Any

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, read_json, write_json
from sparse_fcmae.runtime.options import listed

PROJECT = "sparse-fcmae"
MOST_METRICS = 1000  # that MLflow takes at once
TRACKED = "trackers.json"  # in the run's folder, with the name that the trackers know the run by


class Writer(ABC):
    """A tracker, told of one run.

    run: the run's folder. name: what the run is called by the tracker for ever, 32 letters and digits. options: those
    of the run. step: how many are done already.
    """

    @abstractmethod
    def __init__(self, run: Path, name: str, options: dict[str, Any], step: int) -> None: ...

    @abstractmethod
    def rows(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Takes values of steps, all of them finite."""

    @abstractmethod
    def close(self) -> None:
        """Ends the tracker's account of the run."""


class TensorBoard(Writer):
    def __init__(self, run: Path, name: str, options: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run), purge_step=step + 1)

    def rows(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class OfRun(Writer):
    """A tracker whose account of the run is an object with `log` and `finish`."""

    run: Any

    def rows(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class WandB(OfRun):
    def __init__(self, run: Path, name: str, options: dict[str, Any], step: int) -> None:
        import wandb

        settings = wandb.Settings(silent=True)
        self.run = wandb.init(
            project=PROJECT, id=name, name=run.name, dir=str(run), config=options, resume="allow", settings=settings
        )


class MLflow(Writer):
    def __init__(self, run: Path, name: str, options: dict[str, Any], step: int) -> None:
        import mlflow

        self.client, self.metric = mlflow.MlflowClient(), mlflow.entities.Metric
        known = self.client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self.client.create_experiment(PROJECT)
        found = self.client.search_runs([experiment], f"tags.run = '{name}'")
        started = found[0] if found else self.client.create_run(experiment, run_name=run.name, tags={"run": name})
        self.id = started.info.run_id
        for option, value in options.items() if not found else ():
            self.client.log_param(self.id, option, value)

    def rows(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        now = int(1000 * time())
        metrics = [self.metric(name, value, now, step) for step, values in rows for name, value in values.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics[first : first + MOST_METRICS])

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio(OfRun):
    def __init__(self, run: Path, name: str, options: dict[str, Any], step: int) -> None:
        import trackio

        self.run = trackio.init(
            project=PROJECT, name=f"{run.name}-{name[:8]}", config=options, resume="allow", embed=False
        )


class Comet(Writer):
    def __init__(self, run: Path, name: str, options: dict[str, Any], step: int) -> None:
        import comet_ml

        online = comet_ml.get_config()["comet.api_key"] is not None
        config = comet_ml.ExperimentConfig(
            name=run.name,
            log_code=False,
            log_git_metadata=False,
            log_git_patch=False,
            display_summary_level=0,
            auto_output_logging=False,
            auto_metric_logging=False,
            auto_param_logging=False,
            offline_directory=str(run),
        )
        self.experiment = comet_ml.start(
            project_name=PROJECT,
            experiment_key=name,
            mode="get_or_create" if online else "create",
            online=online,
            experiment_config=config,
        )
        self.experiment.log_parameters(options)

    def rows(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            self.experiment.log_metrics(values, step=step)

    def close(self) -> None:
        self.experiment.end()


WRITERS: dict[str, type[Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
    "comet": Comet,
}


PACKAGES = {"comet": "comet_ml"}  # that are imported under another name than the tracker's


def check_trackers(names: str | None) -> None:
    """Raises UserError for trackers that are unknown or not installed. names: as in `Writers.of`."""
    for kind in listed("log_to", names, str, WRITERS) if names is not None else ():
        if find_spec(PACKAGES.get(kind, kind)) is None:
            raise UserError(f"`log_to` {kind} is not installed: pip install 'sparse-fcmae[{kind}]'")


class Writers:
    """The trackers that a run is told to. name: what they know the run by."""

    def __init__(self, chosen: dict[str, Writer], name: str = "", usual: bool = False) -> None:
        self.chosen, self.name, self.usual = chosen, name, usual
        self.say: Callable[[str], None] = print

    @classmethod
    def of(cls, names: str | None, run: Path, options: dict[str, Any], step: int) -> "Writers":
        """Those named, with commas between them; without names TensorBoard, if it is there.

        Raises UserError for trackers that can't be reached. Nothing that is in the run's folder is changed.
        """
        name, chosen = _name_of(run, step), {}
        for kind in listed("log_to", names, str, WRITERS) if names is not None else ():
            try:
                if kind != "tensorboard":
                    chosen[kind] = WRITERS[kind](run, name, options, step)
                else:  # its files are begun with the run's
                    import_module("torch.utils.tensorboard")
            except Exception as error:  # each has its own
                raise UserError(f"`log_to` {kind} can't be used: {one_line(error)}") from None
        return cls(chosen, name, usual=names is None or "tensorboard" in names)

    def begin(self, run: Path, step: int, say: Callable[[str], None]) -> None:
        """Opens what is in the run's folder. say: takes a line for the user where a tracker fails."""
        self.say = say
        if self.chosen:
            write_json(run / TRACKED, {"name": self.name})
        if self.usual:
            with suppress(Exception):  # not installed, or with a protobuf or NumPy that it does not go with
                self.chosen["tensorboard"] = TensorBoard(run, self.name, {}, step)

    def rows(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Hands values of steps on to all, without those that are not finite, which trackers do not take."""
        finite = [(step, {k: v for k, v in values.items() if math.isfinite(v)}) for step, values in rows]
        self._each(lambda writer: writer.rows(finite))

    def close(self) -> None:
        self._each(lambda writer: writer.close())

    def _each(self, do: Callable[[Writer], None]) -> None:
        for name, writer in list(self.chosen.items()):
            try:
                do(writer)
            except Exception as error:
                del self.chosen[name]
                self.say(f"{name} failed, and is told nothing more of this run: {one_line(error)}")


def _name_of(run: Path, step: int) -> str:
    """What the trackers call a run: as before, if it goes on."""
    file = run / TRACKED
    return read_json(file)["name"] if step and file.is_file() else uuid.uuid4().hex
