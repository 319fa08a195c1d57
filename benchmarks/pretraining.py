"""Images a second of `sparse-fcmae pretrain` itself, from files on, and what its time is spent on.

An image has to be decoded and cropped, which is measured on one core, and takes its share of a step, which is measured
on images that are in memory. Ideally nothing is added to that: on a CPU both share its cores, beside a GPU the slower
of both counts. Times of the same round are compared, as the speed of a machine changes.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sparse_fcmae.benchmarks.config import PretrainingConfig
from sparse_fcmae.benchmarks.data import load_all
from sparse_fcmae.benchmarks.engine import Run, benchmark, torch_threads
from sparse_fcmae.benchmarks.gates import check_backends
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import Case, run_of
from sparse_fcmae.benchmarks.throughput import GATE_BATCH
from sparse_fcmae.data.batches import TrainingImages
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import RandomView
from sparse_fcmae.runtime.device import cores_per_process
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.tasks.pretraining import pretrain

DECODED = 200  # images a round at most
STEPS = 10  # that are timed a round on images in memory
BETWEEN = 5  # steps between two lines of a run's log
UNCOUNTED = 2 * BETWEEN  # steps at a run's beginning
COLUMNS: Columns = {
    "model": ("model", ""),
    "dtype": ("dtype", ""),
    "batch_size": ("batch", "d"),
    "part": ("part", ""),
    "ms": ("ms an image", ".3f"),
    "cores": ("cores", "d"),
    "core_ms": ("core-ms an image", ".3f"),
    "images_per_second": ("images/s", ".1f"),
    "of_ideal": ("of the ideal", ".3f"),
    "data_wait": ("waiting for images", ".3f"),
}


@benchmark("pretrain", PretrainingConfig, COLUMNS)
def pretraining(config: PretrainingConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns rows for decoding, for the step, for both together as the ideal, and for the run itself.

    core_ms is what an image takes of the cores, ms what it takes of the time. of_ideal is the median over the rounds of
    the ideal time over the run's. Raises UserError for wrong options and where the step does not pass its gate.
    """
    case = Case.of(config, device)
    if not config.data:
        raise UserError("`data` is missing: name the folder with the images")
    source = ImageFolder(config.data)
    gated = check_backends(replace(case, batch_size=GATE_BATCH), "pretrain", ["native"])
    if reason := gated["native"].get("refused"):
        raise UserError(f"the step is not measured: {reason}")
    on_cpu = device.type == "cpu"
    cores = torch.get_num_threads() if on_cpu else cores_per_process()
    crops = TrainingImages(source, RandomView(case.image_size), config.seed)
    step = run_of(case, "pretrain", "native", None if on_cpu else "graphs")
    seconds: dict[str, list[float]] = {"decoding": [], "step": [], "ideal": [], "pretrain": []}
    waits = []
    for _ in range(config.rounds):
        run, waited = pretrain_from_files(config, device)  # first, as it refuses images that can't be read
        decoded, stepped = decode_on_one_core(crops), take_steps(step, case)
        ideal = stepped + decoded / cores if on_cpu else max(stepped, decoded / cores)
        for name, spent in zip(seconds, (decoded, stepped, ideal, run), strict=True):
            seconds[name].append(spent)
        waits.append(waited)
    rows = {}
    for name, spent in seconds.items():
        busy = 1 if name == "decoding" else cores
        milliseconds = 1e3 * statistics.median(spent)
        rows[name] = {"part": name, "ms": milliseconds, "images_per_second": 1e3 / milliseconds}
        rows[name] |= {"cores": busy, "core_ms": busy * milliseconds} if on_cpu or busy == 1 else {}
    ratios = [ideal / run for ideal, run in zip(seconds["ideal"], seconds["pretrain"], strict=True)]
    rows["pretrain"] |= {"of_ideal": statistics.median(ratios), "data_wait": statistics.median(waits)}
    yield [case.setting | row for row in rows.values()]


def decode_on_one_core(crops: TrainingImages) -> float:
    """Seconds that an image takes to be decoded and cropped, as by one of a loader's processes."""
    indices = list(range(min(DECODED, len(crops.source))))
    with torch_threads(1):
        start = time.perf_counter()
        load_all(lambda index: crops[0, index], indices, crops.seed)
        return (time.perf_counter() - start) / len(indices)


def take_steps(step: Run, case: Case) -> float:
    """Seconds that an image takes of a whole step on images that are in memory."""
    step()
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)
    return (time.perf_counter() - start) / STEPS / case.batch_size


def pretrain_from_files(config: PretrainingConfig, device: torch.device) -> tuple[float, float]:
    """Seconds that an image takes in a run of `pretrain`, and the share of them in which no image was there.

    What comes before the first steps and after the last one is not counted, nor are the first steps.
    """
    with TemporaryDirectory() as folder:
        with redirect_stdout(StringIO()):  # its log, which is not a benchmark's output
            pretrain(
                data=config.data,
                out=f"{folder}/run",
                model=config.model,
                image_size=config.image_size,
                mask_ratio=config.mask_ratio,
                dtype=config.dtype,
                device=str(device),
                batch_size=config.batch_size,
                max_steps=UNCOUNTED + config.steps,
                log_every=BETWEEN,
                seed=config.seed,
            )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    counted = [json.loads(line) for line in lines][UNCOUNTED:]
    seconds = [1 / row["images_per_second"] for row in counted]
    waited = [second * row["data_wait"] for second, row in zip(seconds, counted, strict=True)]
    return statistics.mean(seconds), sum(waited) / sum(seconds)
