"""All that there is to measure on a GPU, in parts, for a machine that is there for some minutes only.

Each part is a command in a process of its own that may take so long and no longer. A part's table is on disk once it is
complete, and a call goes on with the parts that the one before has not done. The first part checks every backend's
results, and compiles the Triton kernels into a cache in the same folder, which later parts and calls use.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparse_fcmae.backends import available_backends
from sparse_fcmae.benchmarks.config import GpuConfig
from sparse_fcmae.benchmarks.results import Row, environment
from sparse_fcmae.benchmarks.summary import read_rows, summarise
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.runtime.device import choose_device
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json, write_atomic, write_json, writing
from sparse_fcmae.runtime.lock import lock_folder
from sparse_fcmae.runtime.options import check, keywords_of, listed
from sparse_fcmae.runtime.signals import STOPPING

MODELS = {"atto": 256, "tiny": 128, "base": 64, "large": 32}  # images a step
BACKENDS = "native,masked,torch"
ROOT = Path(__file__).resolve().parents[1]  # of a checkout
STATES, ENVIRONMENT = "parts.json", "environment.json"
GRACE = 10  # seconds to end by itself once it is interrupted
CUT = "cut short"  # by the end of the call, so that the next one does it again


@dataclass(frozen=True)
class Part:
    """What is measured together. commands: run at the same time, words for Python. seconds: after which they are ended.

    refused: why the part can't be done here.
    """

    seconds: int
    commands: list[list[str]]
    refused: str | None = None


def plan(config: GpuConfig) -> dict[str, Part]:
    """The parts by name, the most important first."""

    def bench(seconds: int, *commands: str) -> Part:
        start = ["-m", "sparse_fcmae", "bench"]
        return Part(seconds, [[*start, *command.split(), "--device", config.device] for command in commands])

    step = f"throughput --dtype bf16 --backend {BACKENDS} --model"
    works = "--work step,pretrain,forward --rounds 20"
    gates = f"--batch-size 8 --rounds 1 --work step,pretrain --backend {BACKENDS}"
    parts = {
        "parity": bench(
            180, *(f"throughput --model {m} --dtype {d} {gates}" for m in MODELS for d in ("bf16", "fp32"))
        ),
        "tests": tests(),
    }
    parts |= {m: bench(90, f"{step} {m} --batch-size {b} {works}") for m, b in MODELS.items()}
    parts |= {
        "kernels": bench(90, "kernels --model base --batch-size 64 --dtype bf16 --rounds 20"),
        "pretrain": bench(150, "pretrain --model tiny --batch-size 128 --dtype bf16 --steps 50"),
    }
    if config.data:
        parts["pretrain"].commands[0].extend(["--data", config.data])
    else:
        parts["pretrain"] = Part(0, [], "it needs images: give `data`")
    parts |= {
        f"{m}-compiled": bench(240, f"{step} {m} --batch-size {b} --work step --rounds 10 --compiled")
        for m, b in MODELS.items()
    }
    parts |= {
        f"{m}-fp32": bench(90, f"throughput --dtype fp32 --backend {BACKENDS} --model {m} --batch-size {b} {works}")
        for m, b in MODELS.items()
    }
    return parts | {
        "memory": bench(180, f"{step} base --batch-size max --work pretrain --rounds 5"),
        "unmasked": bench(90, f"{step} tiny --batch-size 64 --mask-ratio 0 --work step --rounds 20"),
        "finetune": bench(120, "compare --model tiny --batch-size 64 --dtype bf16 --drop-path 0.2"),
        "autoencoders": bench(120, "compare --task pretrain --model base --batch-size 64 --dtype bf16"),
    }


def tests() -> Part:
    """The tests that need a GPU, where this is a checkout and there is pytest."""
    if not (ROOT / "tests" / "test_gpu.py").is_file():
        return Part(0, [], "it needs a checkout, which has the tests")
    if not find_spec("pytest"):
        return Part(0, [], "it needs pytest")
    several = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "load"] if find_spec("xdist") else []
    words = ["-m", "pytest", str(ROOT / "tests"), "--rootdir", str(ROOT), "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    return Part(240, [[*words, *several]])


@keywords_of(GpuConfig)
def gpu(options: dict[str, Any]) -> str:
    """Measures until `minutes` are over, and returns the summary of all that was measured in `out` so far.

    Raises UserError for wrong options and where there is no GPU that the kernels can serve.
    """
    config = GpuConfig(**options)
    check(config)
    end = time.monotonic() + 60 * config.minutes
    parts = plan(config)
    chosen = listed("parts", config.parts, str, parts) if config.parts else list(parts)
    if config.data:
        ImageFolder(config.data)  # raises where there are no images, not when their turn comes
    require_gpu(config.device)
    out = Path(config.out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out), interrupted_by_signals():
        states: dict[str, Row] = read_json(out / STATES) if (out / STATES).exists() else {}
        if not config.parts:
            chosen = [name for name in parts if not states.get(name, {}).get("ended")]
        begin(out, environment("gpu", config, choose_device(config.device)))
        for number, name in enumerate(bar := tqdm(chosen, unit="part")):
            bar.set_description(name)
            part, left = parts[name], end - time.monotonic()
            if left < part.seconds / 2:
                if not number:
                    raise UserError(f"`minutes` {config.minutes:g} are too few for {name}, of {part.seconds} seconds")
                break
            states[name] = {"state": CUT, "ended": False}  # until it has come to its end
            write_json(out / STATES, states)
            states[name] = run_part(name, part, out, left)
            write_json(out / STATES, states)
            write_summary(out, parts, states)
            bar.write(f"{name}: {states[name]['state']}")
    return write_summary(out, parts, states)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Has what ends this process raise KeyboardInterrupt, or the processes of a part would stay at work on the GPU."""
    numbers = [n for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_gpu(device: str) -> None:
    """Raises UserError unless the native kernels serve a GPU of this name."""
    if not torch.cuda.is_available():
        raise UserError(f"this needs a GPU that PyTorch can use, and PyTorch {torch.__version__} finds none")
    found = choose_device(device)
    if found.type != "cuda":
        raise UserError(f"`device` {device} is no GPU")
    if reason := available_backends(found)["native"]:
        raise UserError(f"there are no kernels to measure: {reason}")


def begin(out: Path, setting: Row) -> None:
    """Writes what the figures depend on. Raises UserError where the folder has figures of another machine."""
    before = read_json(out / ENVIRONMENT) if (out / ENVIRONMENT).exists() else setting
    for name in ("device", "torch", "triton"):
        if before.get(name) != setting.get(name):
            raise UserError(f"`out` {out} has figures of {name} {before.get(name)}: choose another folder")
    write_json(out / ENVIRONMENT, setting)


def run_part(name: str, part: Part, out: Path, left: float) -> Row:
    """Runs a part's commands. left: seconds until the call ends.

    Returns what there is to say of it, and as "ended" whether the next call leaves it out.
    """
    if part.refused:
        return {"state": part.refused, "ended": False}
    start, limit = time.monotonic(), min(part.seconds, left - GRACE)
    processes, logs = [], []
    try:
        for place, command in zip(places(name, len(part.commands)), part.commands, strict=True):
            rows = out / f"{place}.csv"
            rows.parent.mkdir(exist_ok=True)
            rows.unlink(missing_ok=True)
            words = [*command, "--csv", str(rows)] if "sparse_fcmae" in command else command
            logs.append(out / f"{place}.log")
            with logs[-1].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *words],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=with_caches(out),
                        start_new_session=True,  # so that its own processes end with it
                    )
                )
        while any(process.poll() is None for process in processes) and time.monotonic() - start < limit:
            time.sleep(0.1)
        late = any(process.poll() is None for process in processes)
    finally:
        end(processes)
    seconds = round(time.monotonic() - start, 1)
    if late and limit < part.seconds:
        return {"state": CUT, "ended": False, "seconds": seconds}
    if late:
        return {"state": f"took more than {part.seconds} s", "ended": True, "seconds": seconds}
    codes = [process.returncode for process in processes]
    failed = [str(log.relative_to(out)) for log, code in zip(logs, codes, strict=True) if code]
    state = f"failed, see {', '.join(failed)}" if failed else refused(logs) or "done"
    return {"state": state, "ended": True, "seconds": seconds}


def refused(logs: list[Path]) -> str:
    """What the rows beside these logs say was not measured, and why; nothing where all was."""
    rows = [row for log in logs if log.with_suffix(".csv").exists() for row in read_rows(str(log.with_suffix(".csv")))]
    what = ("model", "batch_size", "dtype", "work", "candidate", "refused")
    reasons = [" ".join(row[key] for key in what if row.get(key)) for row in rows if row.get("refused")]
    return f"not measured: {'; '.join(dict.fromkeys(reasons))}" if reasons else ""


def places(name: str, commands: int) -> Iterable[str]:
    """How the files of a part's commands are called.

    Those of commands that ran at the same time are in a folder of their own, as their times are worth nothing.
    """
    return [name] if commands == 1 else [f"{name}/{number}" for number in range(1, commands + 1)]


def with_caches(out: Path) -> dict[str, str]:
    """The environment of a part: what is compiled is kept in `out`, unless the user has said where else."""
    caches = {"TRITON_CACHE_DIR": out / "cache" / "triton", "TORCHINDUCTOR_CACHE_DIR": out / "cache" / "inductor"}
    return {name: str(path.absolute()) for name, path in caches.items()} | os.environ | {"PYTHONUNBUFFERED": "1"}


def end(processes: list[subprocess.Popen]) -> None:
    """Ends processes with those that they have started: first by an interrupt, which they may answer."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + GRACE / 2
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):  # none is left, or it hangs in the driver
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE / 2)


def write_summary(out: Path, parts: dict[str, Part], states: dict[str, Row]) -> str:
    """Writes and returns what was measured in the folder, and what has become of the parts."""
    text = f"{summarise(read_rows(str(out)))}\n\n{progress(parts, states)}"
    write_atomic(out / "summary.md", lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    return text


def progress(parts: dict[str, Part], states: dict[str, Row]) -> str:
    """What has become of each part, in a line each, those that are done in one."""
    said = {name: states.get(name, {}).get("state", "not run yet") for name in parts}
    done = [name for name, state in said.items() if state == "done"]
    lines = [f"- {name}: {state}" for name, state in said.items() if state != "done"]
    return "\n".join([f"- done: {', '.join(done) or 'nothing'}", *lines])
