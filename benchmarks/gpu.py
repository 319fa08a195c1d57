"""Training steps and kernels on a GPU: every backend, plain, compiled and in CUDA graphs.

A backend is timed once its features and gradients are those of `masked` (see `throughput.gate`). All candidates of a
model and batch take turns. A kernel is timed by launching again what a step of the encoder has launched, alone and with
cold caches; its bytes are those of the tensors it is given, its rate is compared with that of a large copy in the same
run. Every figure becomes a row of a CSV file at once, so that an interrupted run keeps what it has.
"""

import csv
import gc
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_fcmae import __version__, kernels
from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.benchmarks.throughput import BASELINE, gate
from sparse_fcmae.benchmarks.timing import draw_mask, kept_of, take_turns
from sparse_fcmae.config import GpuConfig, image_size_of
from sparse_fcmae.encoder import SIZES, SparseEncoder
from sparse_fcmae.errors import UserError
from sparse_fcmae.fcmae import FCMAE
from sparse_fcmae.files import writing
from sparse_fcmae.ops.block_dwconv import TAPS
from sparse_fcmae.training.distributed import choose_device
from sparse_fcmae.training.optim import adamw, set_lr
from sparse_fcmae.training.step import WARMUP, GraphedTrainStep, TrainStep, fcmae_loss

COLUMNS = (
    *("what", "model", "batch_size", "image_size", "mask_ratio", "dtype", "candidate", "ms", "images_per_second"),
    *("over_masked", "peak_mb", "calls", "gb_per_second", "of_copy", "tflop_per_second", "of_product", "note"),
    *("device", "driver", "torch", "triton", "commit"),
)
GATE_BATCH = 8
OUT_OF_MEMORY = "out of memory"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """What is timed: a size of model, a batch, and the backends that gave exact results."""

    config: GpuConfig
    model: str
    batch: int
    size: tuple[int, int]
    device: torch.device
    exact: list[str]

    @property
    def bf16(self) -> bool:
        return self.config.dtype == "bf16"

    @property
    def graphs(self) -> bool:
        return self.device.type == "cuda" and "native" in self.exact


def gpu(**options: Any) -> list[dict[str, Any]]:
    """Prints and returns the rows; options are those of `GpuConfig`."""
    config = GpuConfig(**options)
    device = choose_device(config.device)
    if config.device == "auto" and device.type == "cpu":
        raise UserError("there is no GPU here: give --device cpu to try the command out all the same")
    models, batches = config.models.split(","), config.batch_sizes.split(",")
    for model in models:
        if model not in SIZES:
            raise UserError(f"unknown model {model!r}: choose of {', '.join(SIZES)}")
    if not all(batch.isdecimal() and int(batch) for batch in batches) or config.rounds < 1:
        given = f"--batch-sizes {config.batch_sizes} --rounds {config.rounds}"
        raise UserError(f"{given}: give numbers greater than 0, such as 64,256 and 10")
    size = image_size_of(config.image_size)
    kept_of(SparseEncoder("atto", image_size=size).grid(*size), config.mask_ratio)  # refuses wrong ones
    setting, rows = environment(device), []
    print(", ".join(f"{name} {value}" for name, value in setting.items()))
    path = Path(config.csv)
    with writing(path):
        file = path.open("a", newline="")
    with file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        for row in measure(config, models, [int(batch) for batch in batches], size, device):
            rows.append(row | setting)
            with writing(path):
                writer.writerow(rows[-1])
                file.flush()
            print(line(row))
    return rows


def measure(
    config: GpuConfig, models: list[str], batches: list[int], size: tuple[int, int], device: torch.device
) -> Iterator[dict[str, Any]]:
    """The rows, as they come."""
    ceilings = measure_ceilings(device, config.rounds)
    for model in models:
        fixed = {name: getattr(config, name) for name in ("image_size", "mask_ratio", "dtype")} | {"model": model}
        exact = exact_backends(config, model, size, device)
        for name in BACKENDS.keys() - set(exact):
            reason = BACKENDS[name].unusable(device) or "features or gradients differ"
            yield {"what": "gate", **fixed, "candidate": name, "note": reason}
        for batch in batches:
            case = Case(config, model, batch, size, device, exact)
            candidates = {"encoder": encoder_steps(case), "pretraining step": pretraining_steps(case)}
            for what, builds in candidates.items():
                for row in time_steps(builds, case):
                    yield {"what": what, **fixed, "batch_size": batch, **row}
            for row in time_kernels(case, *ceilings):
                yield {"what": "kernel", **fixed, "batch_size": batch, **row}


def exact_backends(config: GpuConfig, model: str, size: tuple[int, int], device: torch.device) -> list[str]:
    """The backends that can run, and whose features and gradients are those of BASELINE."""
    torch.manual_seed(0)
    encoder = SparseEncoder(model, image_size=size).to(device)
    with torch.no_grad():
        for parameter in encoder.parameters():  # GRN and biases start at zero and would go untested
            parameter.add_(0.02 * torch.randn_like(parameter))
    mask = draw_mask(GATE_BATCH, encoder.grid(*size), config.mask_ratio).to(device)
    usable = [name for name, layout in BACKENDS.items() if layout.unusable(device) is None]
    images = torch.randn(GATE_BATCH, 3, *size, device=device)
    return gate(encoder, images, mask, usable, config.dtype == "bf16")[1]


def encoder_step(case: Case, backend: str, *, masked: bool = True, compiled: bool = False) -> Run:
    """A forward and backward pass of the encoder."""
    encoder = SparseEncoder(case.model, image_size=case.size, backend=backend).to(case.device)
    images, grid = torch.randn(case.batch, 3, *case.size, device=case.device), encoder.grid(*case.size)
    ratio = case.config.mask_ratio if masked else 0
    mask, kept = draw_mask(case.batch, grid, ratio).to(case.device), kept_of(grid, ratio)
    call = torch.compile(encoder, fullgraph=True, dynamic=False, mode="max-autotune") if compiled else encoder

    def run() -> None:
        encoder.zero_grad()
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.bf16):
            features = call(images, mask, kept)
        features.float().square().mean().backward()

    return run


def graphed_encoder_step(case: Case) -> Run:
    """The same from one CUDA graph."""
    step, stream, graph = encoder_step(case, "native"), torch.cuda.Stream(case.device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(case.device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream(case.device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        step()
    return lambda: (graph.replay(), step)  # which holds the tensors that the graph works on


def encoder_steps(case: Case) -> dict[str, Callable[[], Run]]:
    """What makes each candidate's forward and backward pass of the encoder."""
    builds: dict[str, Callable[[], Run]] = {name: partial(encoder_step, case, name) for name in case.exact}
    if "native" in case.exact:
        builds["native, nothing masked"] = partial(encoder_step, case, "native", masked=False)
    if case.graphs:
        builds["native, graph"] = partial(graphed_encoder_step, case)
    if case.config.compiled:
        builds |= {f"{name}, compiled": partial(encoder_step, case, name, compiled=True) for name in case.exact}
    return builds


def pretraining_step(case: Case, backend: str, *, graphed: bool = False) -> Run:
    """A whole step: masks, forward and backward pass of encoder and decoder, optimiser."""
    fcmae = FCMAE(case.model, image_size=case.size, mask_ratio=case.config.mask_ratio, backend=backend).to(case.device)
    optimizer = adamw(fcmae, 0.05, (0.9, 0.95), capturable=graphed)
    kind = GraphedTrainStep if graphed else TrainStep
    loss_of = fcmae_loss(fcmae, fcmae.kept(case.size))
    work = kind(loss_of, fcmae, optimizer, share=case.batch, bf16=case.bf16)
    pixels = torch.randint(256, (case.batch, *case.size, 3), dtype=torch.uint8, device=case.device)

    def run() -> None:
        set_lr(optimizer, 1e-5)
        work.add(pixels, fcmae.draw_mask(case.batch, case.size, device=case.device), last=True)
        work.finish()

    for _ in range(WARMUP + 1 if graphed else 0):
        run()
    return run


def pretraining_steps(case: Case) -> dict[str, Callable[[], Run]]:
    """What makes each candidate's whole step; none where nothing is masked."""
    if not case.config.mask_ratio:
        return {}
    builds: dict[str, Callable[[], Run]] = {name: partial(pretraining_step, case, name) for name in case.exact}
    if case.graphs:
        builds["native, graphs"] = partial(pretraining_step, case, "native", graphed=True)
    return builds


def time_steps(builds: dict[str, Callable[[], Run]], case: Case) -> Iterator[dict[str, Any]]:
    """A row for each candidate; one that does not fit into memory says so."""
    runs, peaks = {}, {}
    torch.compiler.reset()  # or else the second batch size would be compiled for any
    for name, build in builds.items():
        if (built := within_memory(partial(built_and_run, build))) is None:
            yield {"candidate": name, "note": OUT_OF_MEMORY}
            continue
        runs[name] = built
        if "graph" not in name and "compiled" not in name:  # those have taken theirs beforehand
            peaks[name] = peak_megabytes(built, case.device)
    times = within_memory(partial(take_turns, runs, case.config.rounds, case.device))
    if times is None:
        yield {"candidate": "all of these together", "note": OUT_OF_MEMORY}
        return
    for name, seconds in times.items():
        typical = statistics.median(seconds)
        row = {"candidate": name, "ms": 1e3 * typical, "images_per_second": case.batch / typical}
        row["peak_mb"] = peaks.get(name)
        if BASELINE in times:
            row["over_masked"] = statistics.median(b / s for b, s in zip(times[BASELINE], seconds, strict=True))
        yield row


def built_and_run(build: Callable[[], Run]) -> Run:
    """A candidate, after its first run."""
    run = build()
    run()
    return run


def within_memory(do: Callable[[], Any]) -> Any:
    """What `do` returns; None where it does not fit into the device's memory."""
    try:
        return do()
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return None


def time_kernels(case: Case, copy: float, flops: float) -> Iterator[dict[str, Any]]:
    """A row for each Triton kernel and shape that a step of the encoder launches."""
    ours = kernels.of(case.device)
    if "native" not in case.exact or not hasattr(ours, "launch"):
        return
    launch, seen, calls = ours.launch, {}, Counter()

    def record(kernel: Any, grid: Any, *arguments: Any, **sizes: Any) -> None:
        launch(kernel, grid, *arguments, **sizes)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        name = getattr(kernel, "base_fn", kernel.fn).__name__.removesuffix("_kernel")
        shape = " ".join(f"{key}={value}" for key, value in sizes.items() if key != "BLOCK_C")
        missing = [n for n, a in zip(kernel.arg_names, arguments, strict=False) if a is None]
        key = f"{name} {shape}" + (f" without {' '.join(missing)}" if missing else "")
        calls[key] += 1
        work = 2 * TAPS * tensors[0].numel() if name.startswith("block_dwconv") else 0
        templates = [a.to("meta") if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        seen.setdefault(key, (kernel, grid, templates, sizes, sum(t.nbytes for t in tensors), work))

    step = within_memory(partial(built_and_run, partial(encoder_step, case, "native")))  # tiles are timed beforehand
    if step is None:
        yield {"candidate": "all", "note": OUT_OF_MEMORY}
        return
    with patch.object(ours, "launch", record):
        step()
    for key, (kernel, grid, templates, sizes, size, work) in seen.items():
        arguments = [
            torch.rand(a.shape, dtype=a.dtype, device=case.device) if isinstance(a, Tensor) and a.is_meta else a
            for a in templates
        ]
        run = partial(launch, kernel, grid, *arguments, **sizes)
        seconds = statistics.median(take_turns({key: run}, case.config.rounds, case.device)[key])
        row = {"candidate": key, "calls": calls[key], "ms": 1e3 * seconds}
        row |= {"gb_per_second": size / seconds / 1e9, "of_copy": size / seconds / copy}
        yield row | ({"tflop_per_second": work / seconds / 1e12, "of_product": work / seconds / flops} if work else {})


def measure_ceilings(device: torch.device, rounds: int) -> tuple[float, float]:
    """Bytes a second, read and written, of a large copy; operations a second of a large product in float32."""
    scale = 4 if device.type == "cuda" else 1
    source, target = torch.zeros(2, scale << 26, device=device).unbind()
    side = 2048 * scale
    square, out = torch.randn(2, side, side, device=device).unbind()
    runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(square, square, out=out)}
    best = {name: min(times) for name, times in take_turns(runs, rounds, device).items()}
    copy, flops = 2 * source.nbytes / best["copy"], 2 * side**3 / best["product"]
    print(f"a large copy moves {copy / 1e9:.0f} GB/s, a large float32 product does {flops / 1e12:.1f} TFLOP/s")
    return copy, flops


def peak_megabytes(run: Run, device: torch.device) -> float | None:
    """The most that a run takes beside what it starts with, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on beside the code, and the code's commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return {
        **{"device": name, "driver": output(query) if device.type == "cuda" else "none", "torch": torch.__version__},
        **{"triton": triton_version, "commit": output(commit) or __version__},
    }


def output(command: list[str]) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    place = f"{row['what']:16} {row['model']:5} {row.get('batch_size', ''):>4} {row['candidate']:44}"
    if "note" in row:
        return f"{place} {row['note']}"
    if row["what"] == "kernel":
        rate = f"{row['gb_per_second']:6.0f} GB/s, {row['of_copy']:.2f} of a copy"
        return f"{place} {row['ms']:9.3f} ms, {row['calls']:3} a step {rate}"
    over = f"{row['over_masked']:6.2f} over {BASELINE}" if "over_masked" in row else ""
    peak = f"{row['peak_mb']:8.0f} MB" if row["peak_mb"] else ""
    return f"{place} {row['ms']:9.2f} ms {row['images_per_second']:9.1f} images/s {over} {peak}".rstrip()
