"""A run of many steps, in which nothing may grow."""

import os
import re
import subprocess
import sys
import time

import pytest
from helpers import flags

STEPS, EVERY = 20_000, 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a process has in use")
def test_nothing_grows_over_20000_steps(pictures, tmp_path):
    """Memory, open files, threads and pictures, with a checkpoint and a picture every 100 steps."""
    run = tmp_path / "run"
    size = {"depths": "1,1,1,1", "dims": "8,8,8,8", "image_size": 16, "stem_stride": 1, "decoder_dim": 8}
    steps = {"batch_size": 4, "epochs": 1, "max_steps": STEPS, "lr": 1e-4, "save_every": EVERY, "num_workers": 1}
    options = {"data": pictures, "out": run, "device": "cpu", "dtype": "fp32", **size, **steps}
    command = [sys.executable, "-m", "sparse_fcmae", "pretrain", *flags(options)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process, seen = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet), []
    place = f"/proc/{process.pid}"
    while process.poll() is None and (not seen or seen[-1][0] < STEPS - EVERY):
        time.sleep(2)
        done = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        with open(f"{place}/status") as status:
            memory = int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024
        seen.append((done, memory, len(os.listdir(f"{place}/fd")), len(os.listdir(f"{place}/task"))))
    assert process.wait() == 0
    settled = [sample for sample in seen if STEPS / 10 < sample[0] < STEPS - EVERY]
    _, memory, files, threads = zip(*settled, strict=True)
    assert max(memory) - min(memory) < 10  # MiB
    assert max(files) - min(files) <= 4  # those of the checkpoint that is being written
    assert max(threads) - min(threads) <= 1
    assert len(list((run / "reconstructions").iterdir())) == 100
    assert len(list((run / "checkpoints").glob("step-*"))) == 3
