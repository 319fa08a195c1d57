"""Runs that are killed, starved of disk, and robbed of their processes, each in earnest; `make test-faults` runs them.

Whatever happens to a run, it ends in the weights of a run to which nothing happened, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from helpers import children_of, flags, flip_bytes
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

KILLS = 50
OPTIONS = {  # 40 images, 4 steps of 10 an epoch
    "model": "atto",
    "image_size": 32,
    "stem_stride": 1,
    "batch_size": 10,
    "lr": 1e-3,
    "dtype": "fp32",
    "device": "cpu",
    "num_workers": 1,
    "log_every": 1,
    "keep_checkpoints": 2,
}
SECONDS = 600  # after which a run that does not end is one that hangs


def command(pictures, out, *launcher, **options):
    arguments = flags({"data": pictures, "out": out, **OPTIONS, **options})
    return [sys.executable, *launcher, "-m", "sparse_fcmae", "pretrain", *arguments, "--resume", "auto"]


def finish(arguments):
    """Runs a command to its end, and returns its exit code and what it printed on stderr."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def rows(run):
    """The losses that a run has written, and whole lines alone."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def wait_for(process, condition):
    end = time.monotonic() + SECONDS
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "the run hangs"
        time.sleep(0.002)


def assert_same(run, whole):
    assert rows(run) == rows(whole)
    trained, expected = (load_file(of / "exported" / "model.safetensors") for of in (run, whole))
    assert trained.keys() == expected.keys()
    for name in expected:
        assert torch.equal(trained[name], expected[name]), name


def undisturbed(pictures, out, **options):
    assert finish(command(pictures, out, **options))[0] == 0
    return out


def test_kills_at_random_moments(pictures, tmp_path):
    """Half of them aim at the writing of a checkpoint, of which there is one after every other step."""
    options = {"epochs": 200, "save_every": 2}
    draw, run, hits = random.Random(0), tmp_path / "run", 0
    arguments = command(pictures, run, **options)
    for number in range(KILLS):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known = len(rows(run))
        if number % 2:
            wait_for(process, lambda known=known: len(rows(run)) > known)
            wait_for(process, lambda: any((run / "checkpoints").glob(".*.tmp")))
            time.sleep(draw.uniform(0, 0.02))
            hits += any((run / "checkpoints").glob(".*.tmp"))
        elif number % 4:
            wait_for(process, lambda known=known: len(rows(run)) > known)
            time.sleep(draw.uniform(0, 0.5))
        else:
            time.sleep(draw.uniform(0, 5))  # anywhere, before the first step too
        assert process.poll() is None, "the run ended before all kills"
        process.kill()
        process.wait()
    assert hits > KILLS // 8
    assert finish(arguments)[0] == 0
    assert_same(run, undisturbed(pictures, tmp_path / "whole", **options))
    assert not list((run / "checkpoints").glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """Makes a disk of so many megabytes at a folder, or changes its size."""
    made = []

    def of_size(megabytes):
        folder, verb = tmp_path / "disk", "remount," if made else ""
        folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"{verb}size={megabytes}m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small disk can't be mounted here")
        made.append(folder)
        return folder

    yield of_size
    if made:
        subprocess.run(["umount", str(made[0])], check=True)


@pytest.mark.parametrize("megabytes", [1, 40, 90, 135])
def test_a_disk_that_is_too_small(pictures, tmp_path, small_disk, megabytes):
    """It fills within the first checkpoint, between its files, or with a later one."""
    options = {"epochs": 3, "save_every": 4}
    disk = small_disk(megabytes)
    code, said = finish(command(pictures, disk / "run", **options))
    assert (code, said.splitlines()[-1].count("No space left on device")) == (2, 1), said
    small_disk(1000)
    assert finish(command(pictures, disk / "run", **options))[0] == 0
    assert_same(disk / "run", undisturbed(pictures, tmp_path / "whole", **options))


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_disk_that_somebody_else_fills(pictures, tmp_path, small_disk, step):
    """Logs, metrics and pictures are the first to find no space."""
    options = {"epochs": 30, "save_every": 4}
    disk = small_disk(400)
    arguments = command(pictures, disk / "run", **options)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: len(rows(disk / "run")) >= step)
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "No space left on device" in said.splitlines()[-1]
    (disk / "filler").unlink()
    assert finish(arguments)[0] == 0
    assert_same(disk / "run", undisturbed(pictures, tmp_path / "whole", **options))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "meta.json"])
@pytest.mark.parametrize("spoil", [flip_bytes, lambda path: path.write_bytes(b""), os.remove])
def test_a_damaged_newest_checkpoint(pictures, tmp_path, name, spoil):
    options = {"epochs": 3, "save_every": 4}
    whole = undisturbed(pictures, tmp_path / "whole", **options)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "exported")
    spoil(run / "checkpoints" / "step-00000012" / name)
    code, said = finish(command(pictures, run, **options))
    assert code == 0, said
    assert "is damaged and left out" in (run / "train.log").read_text()
    assert_same(run, whole)


def test_a_killed_loader_process(pictures, tmp_path):
    options, run = {"epochs": 30, "save_every": 1000}, tmp_path / "run"
    arguments = command(pictures, run, **options)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: len(rows(run)) >= 5)
    (loader,) = children_of(process.pid)
    os.kill(loader, signal.SIGKILL)
    said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 2
    assert "Traceback" not in said
    assert "a process that loads images was killed" in said.splitlines()[-1]
    assert any((run / "checkpoints").glob("step-*"))
    assert finish(arguments)[0] == 0
    assert_same(run, undisturbed(pictures, tmp_path / "whole", **options))


def test_a_killed_rank_under_elastic_torchrun(pictures, tmp_path):
    """The job goes on by itself, from the newest checkpoint, to the losses of a job that was left alone."""
    options = {"epochs": 30, "save_every": 5}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    subprocess.run(command(pictures, whole, *launcher, **options), check=True, capture_output=True, env=environment)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(pictures, run, *launcher, **options), env=environment, **quiet)
    for steps, victim in ((12, 0), (40, 1)):
        wait_for(process, lambda steps=steps: len(rows(run)) >= steps)
        os.kill(children_of(process.pid)[victim], signal.SIGKILL)
        killed = time.time()
        wait_for(process, lambda killed=killed: (run / "train.log").stat().st_mtime > killed + 1)
    assert process.wait(SECONDS) == 0
    assert (run / "train.log").read_text().count("resumed from") == 2
    assert rows(run) == rows(whole)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named_and_the_job_goes_on(pictures, tmp_path, stopped):
    """As a machine that hangs, or a GPU that is lost. Both ends are looked at: torchrun starts both processes again."""
    options = {"epochs": 30, "save_every": 5, "hang_minutes": 0.2}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run = tmp_path / "run"
    arguments = command(pictures, run, *launcher, **options)
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=errors
        )
        wait_for(process, lambda: len(rows(run)) >= 12)
        os.kill(children_of(process.pid)[stopped], signal.SIGSTOP)
        assert process.wait(SECONDS) == 0
    said = (run / "train.log").read_text()
    assert f": rank {stopped} gives no sign of life" in said
    assert said.count("resumed from") == 1
    assert f"rank {stopped} gives no sign of life" in (tmp_path / "errors").read_text()
    assert len(rows(run)) == 120
