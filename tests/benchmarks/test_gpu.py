"""The parts that are measured on a GPU: here their commands are read, and others run in their place."""

import json
import os
import signal
import time
from threading import Thread

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks import gpu as module
from sparse_fcmae.benchmarks.config import GpuConfig
from sparse_fcmae.benchmarks.gpu import CUT, Part, gpu, plan
from sparse_fcmae.cli import load, main, parse
from sparse_fcmae.runtime.options import check

QUICK = "throughput --image-size 64 --batch-size 2 --mask-ratio 0.5 --rounds 1 --work step --backend native,masked"
SLEEPS = """\
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


def test_every_command_is_one():
    commands = [c for part in plan(GpuConfig(data="images")).values() for c in part.commands if "pytest" not in c]
    assert len(commands) > 20
    for words in commands:
        assert words[:3] == ["-m", "sparse_fcmae", "bench"]
        command, options = parse([*words[2:], "--csv", "rows.csv"])
        assert options["device"] == "cuda"
        check(load(command.config)(**options))


def test_without_a_gpu_it_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "gpu", "--device", "cpu", "--out", str(tmp_path / "gpu")])
    assert stop.value.code == 2
    assert "this needs a GPU that PyTorch can use" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        gpu(out=tmp_path / "gpu", data="/nowhere")
    assert not (tmp_path / "gpu").exists()


@pytest.fixture
def parts(monkeypatch):
    """Parts that take their places, on the CPU."""
    found = {}
    monkeypatch.setattr(module, "plan", lambda config: found)
    monkeypatch.setattr(module, "require_gpu", lambda device: None)
    monkeypatch.setattr(module, "GRACE", 2)
    return found


def gone(log):
    """Whether the process whose number a log begins with ends within seconds."""
    number, deadline = int(log.read_text().split()[0]), time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def states(out):
    return {name: row["state"] for name, row in json.loads((out / "parts.json").read_text()).items()}


def test_parts_run_one_after_the_other_and_leave_rows(parts, pictures, tmp_path):
    words = ["-m", "sparse_fcmae", "bench", *QUICK.split()]
    parts |= {
        "parity": Part(100, [words, [*words, "--dtype", "bf16"]]),
        "rows": Part(100, [[*words, "--dtype", "bf16"]]),
        "fails": Part(100, [["-c", "print('a reason'); raise SystemExit(3)"]]),
        "hangs": Part(2, [["-c", PARENT, "-c", SLEEPS]]),
        "lacks": Part(0, [], "it needs images: give `data`"),
    }
    text = gpu(out=tmp_path, device="cpu", data=pictures)
    assert states(tmp_path) == {
        "parity": "done",
        "rows": "done",
        "fails": "failed, see fails.log",
        "hangs": "took more than 2 s",
        "lacks": "it needs images: give `data`",
    }
    assert (tmp_path / "fails.log").read_text() == "a reason\n"
    assert text.count("| atto, 2, bf16, 64 pixels, 50% masked | encoder, forward and backward |") == 1
    assert "fp32" not in text  # whose times were taken beside others
    assert (tmp_path / "parity" / "1.csv").exists()
    said = [
        "done: parity, rows",
        "fails: failed, see fails.log",
        "hangs: took more than 2 s",
        "lacks: it needs images: give `data`",
    ]
    assert text.splitlines()[-4:] == [f"- {line}" for line in said]
    assert (tmp_path / "summary.md").read_text() == f"{text}\n"
    assert gone(tmp_path / "hangs.log")  # the process that was started by the one that was
    before = (tmp_path / "rows.csv").stat().st_mtime_ns
    assert gpu(out=tmp_path, device="cpu") == text  # nothing is left to do but what was refused
    parts["lacks"] = Part(60, [["-c", ""]])
    assert "- done: parity, rows, lacks\n" in gpu(out=tmp_path, device="cpu")
    gpu(out=tmp_path, device="cpu", parts="rows")
    assert (tmp_path / "rows.csv").stat().st_mtime_ns > before
    assert (tmp_path / "rows.csv").read_text().count("matrix products") == 1


def test_what_the_end_cuts_short_is_done_by_the_next_call(parts, tmp_path):
    parts |= {"first": Part(12, [["-c", "import time; time.sleep(7)"]]), "second": Part(60, [["-c", ""]])}
    start = time.monotonic()
    text = gpu(out=tmp_path, device="cpu", minutes=0.12)
    assert time.monotonic() - start < 12
    assert states(tmp_path) == {"first": CUT}
    assert "- second: not run yet" in text
    gpu(out=tmp_path, device="cpu")
    assert states(tmp_path) == {"first": "done", "second": "done"}
    with pytest.raises(UserError, match=r"`minutes` 0\.1 are too few for second"):
        gpu(out=tmp_path, device="cpu", minutes=0.1, parts="second")


def test_what_a_gate_refuses_is_not_done(parts, tmp_path):
    rows = """
import sys
from pathlib import Path
Path(sys.argv[-1]).write_text("benchmark,model,candidate,refused\\nthroughput,tiny,native,features differ\\n")
"""
    parts["parity"] = Part(60, [["-c", rows, "sparse_fcmae"]])
    assert "- parity: not measured: tiny native features differ" in gpu(out=tmp_path, device="cpu")


def test_a_part_that_is_begun_again_and_not_ended_is_not_done(parts, tmp_path):
    parts |= {"part": Part(60, [["-c", ""]])}
    gpu(out=tmp_path, device="cpu")
    parts |= {"part": Part(60, [["-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)\n" + SLEEPS]])}
    with pytest.raises(KeyboardInterrupt):
        gpu(out=tmp_path, device="cpu", parts="part")
    assert states(tmp_path) == {"part": CUT}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_it_ends_the_part_at_work(parts, tmp_path, number):
    def end():
        while not (tmp_path / "hangs.log").exists() or not (tmp_path / "hangs.log").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    parts["hangs"] = Part(60, [["-c", SLEEPS]])
    Thread(target=end).start()
    with pytest.raises(KeyboardInterrupt):
        gpu(out=tmp_path, device="cpu")
    assert gone(tmp_path / "hangs.log")
    parts["hangs"] = Part(60, [["-c", ""]])
    gpu(out=tmp_path, device="cpu")
    assert states(tmp_path) == {"hangs": "done"}


def test_another_machines_figures_are_not_mixed_in(parts, tmp_path):
    gpu(out=tmp_path, device="cpu")
    setting = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps(setting | {"device": "NVIDIA A100"}))
    with pytest.raises(UserError, match="has figures of device NVIDIA A100: choose another folder"):
        gpu(out=tmp_path, device="cpu")
    with pytest.raises(UserError, match="unknown parts 'nothing'"):
        gpu(out=tmp_path / "new", device="cpu", parts="nothing")
