import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import OF_MACHINE, children_of, fails, flags, flip_bytes, go_back
from PIL import Image
from safetensors.torch import load_file

from sparse_fcmae import UserError, available_backends, load_classifier, load_encoder, pretrain
from sparse_fcmae.cli import main
from sparse_fcmae.evaluation import feature_check
from sparse_fcmae.tasks.pretraining import thin_out
from sparse_fcmae.weights.read import read_weights

SMALL = {  # 40 images, 4 steps of 10 an epoch
    "model": "atto",
    "image_size": 32,
    "stem_stride": 1,
    "batch_size": 10,
    "epochs": 3,
    "lr": 1e-3,
    "save_every": 4,
    "dtype": "fp32",
    "device": "cpu",
    "num_workers": 1,
}


def command(pictures, out, *extra, **options):
    arguments = flags({"data": pictures, "out": out, **SMALL, **options})
    return [sys.executable, "-m", "sparse_fcmae", "pretrain", *arguments, *extra]


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    pretrain(data=pictures, out=run, **SMALL)
    return run


def test_run_folder(whole):
    assert {p.name for p in whole.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "train.log",
        "loss.png",
        "checkpoints",
        "exported",
        "reconstructions",
    }
    steps = sorted(p.name for p in (whole / "checkpoints").glob("step-*"))
    assert steps == ["step-00000004", "step-00000008", "step-00000012"]
    assert (whole / "checkpoints" / "latest").read_text() == "step-00000012\n"
    assert {p.name for p in (whole / "checkpoints" / steps[-1]).iterdir()} == {
        "model.safetensors",
        "trainer.pt",
        "meta.json",
    }
    with Image.open(whole / "reconstructions" / "step-00000012.png") as picture:
        assert picture.size == (4 * 100 + 4, 8 * 100 + 18)
    assert not [p for p in whole.rglob("*") if p.name.endswith((".tmp", ".old"))]
    os.umask(umask := os.umask(0))
    assert {p.stat().st_mode & 0o777 for p in whole.rglob("*") if p.is_file()} == {0o666 & ~umask}


def test_metrics_and_learning(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["epoch"] == 3
    assert rows[0]["loss"] == pytest.approx(1, abs=0.1)
    assert rows[-1]["loss"] < 0.95


def test_export_is_the_trained_encoder(whole):
    model = load_file(whole / "checkpoints" / "step-00000012" / "model.safetensors")
    state = load_file(whole / "exported" / "model.safetensors")
    assert all(torch.equal(v, model[f"encoder.{k}"]) for k, v in state.items())
    encoder = load_encoder(whole)
    assert (encoder.image_size, encoder.stem_stride) == ((32, 32), 1)
    assert encoder(torch.randn(1, 3, 32, 32)).shape == (1, 320, 4, 4)


def start(arguments, run, steps, **pipes):
    """Starts a run and waits until it has recorded so many steps."""
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, text=True, **pipes)
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_killed_and_resumed_run_ends_with_the_same_weights(pictures, whole, tmp_path, steps):
    run = tmp_path / "run"
    arguments = command(pictures, run, log_every=1, save_every=2)
    process = start(arguments, run, steps, stdout=subprocess.DEVNULL)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*arguments, "--resume"], check=True, capture_output=True)
    assert losses(run) == losses(whole)
    for a, b in zip(*(load_file(r / "exported" / "model.safetensors").values() for r in (run, whole)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_to_all_processes_save_a_checkpoint_and_resume_needs_out_alone(pictures, whole, tmp_path, number):
    """Ctrl-C in a terminal, and what batch systems send, reach the processes that load images too."""
    run = tmp_path / "run"
    arguments = command(pictures, run, log_every=1, save_every=100)
    process = start(arguments, run, 1, stdout=subprocess.PIPE, start_new_session=True)
    os.killpg(process.pid, number)
    output, _ = process.communicate()
    assert process.returncode == 75
    assert "to go on" in output
    stopped = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 0 < stopped < 12
    pretrain(out=run, resume=True)
    assert losses(run) == losses(whole)


def test_second_process_is_kept_out_of_a_run(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(command(pictures, run, log_every=1, epochs=100), run, 1, stdout=subprocess.DEVNULL)
    try:
        for arguments in (["--out", run, "--resume"], [*flags(SMALL), "--data", pictures, "--out", run, "--overwrite"]):
            assert "in use by another process" in fails(capsys, "pretrain", *arguments)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_damaged_checkpoint_is_left_out_and_the_run_ends_in_the_same_weights(pictures, whole, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    folders = sorted((run / "checkpoints").glob("step-*"))
    assert len(folders) == 3
    flip_bytes(folders[2] / "trainer.pt")
    flip_bytes(folders[1] / "model.safetensors")
    (run / "checkpoints" / "latest").write_text("")
    weights = read_weights(run, whole=True)
    assert [note.split(": ")[1].split()[0] for note in weights.notes] == ["trainer.pt", "model.safetensors"]
    with pytest.raises(UserError, match=r"step-00000012 is damaged: trainer.pt has other bytes .*: take another"):
        read_weights(folders[2])
    pretrain(out=run, resume=True, keep_checkpoints=1)
    log = (run / "train.log").read_text()
    assert f"checkpoint {folders[2]} is damaged and left out: trainer.pt has other bytes than were written" in log
    assert f"checkpoint {folders[1]} is damaged and left out: model.safetensors has other bytes" in log
    assert f"resumed from {folders[0]}" in log
    assert losses(run) == losses(whole)
    trained, expected = (load_file(of / "exported" / "model.safetensors") for of in (run, whole))
    assert all(torch.equal(trained[key], expected[key]) for key in expected)
    assert (run / "checkpoints" / "latest").read_text() == "step-00000012\n"
    assert (run / "checkpoints" / "step-00000012" / "meta.json").exists()


def test_one_command_starts_goes_on_and_ends(pictures, whole, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [str(word) for word in command(pictures, run, save_every=2)[3:]] + ["--resume", "auto"]
    process = start([*command(pictures, run, save_every=2), "--resume", "auto"], run, 5, stdout=subprocess.DEVNULL)
    process.kill()
    process.wait()
    main(arguments)
    assert losses(run) == losses(whole)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    main(arguments)
    assert f"the run in {run} is finished: it is in {run / 'exported'}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_run_is_made_longer_with_another_rate(pictures, whole, tmp_path):
    """The schedule is that of the longer run from the step on where it goes on."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    pretrain(out=run, resume=True, epochs=5, lr=3e-4, clip_grad=2.0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 21))
    pretrain(data=pictures, out=tmp_path / "long", **SMALL | {"epochs": 5, "lr": 3e-4})
    long = [json.loads(line) for line in (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows[12:]] == pytest.approx([row["lr"] for row in long[12:]], rel=1e-3)
    log = (run / "train.log").read_text()
    for option in ("--epochs 5, which was 3", "--lr 0.0003, which was ", "--clip-grad 2, which was none"):
        assert f"changed from here on: {option}" in log
    assert json.loads((run / "config.json").read_text())["epochs"] == 5


def test_run_inside_its_data_does_not_train_on_its_own_pictures(pictures, whole, tmp_path):
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", pictures, data], check=True)
    pretrain(data=data, out=data / "runs", **SMALL | {"epochs": 1})
    pretrain(out=data / "runs", resume=True)
    assert losses(data / "runs")[0] == losses(whole)[0]


def test_micro_batches_change_rounding_at_most(pictures, whole, tmp_path):
    pretrain(data=pictures, out=tmp_path / "run", **SMALL, micro_batch_size=4)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.usefixtures("rehearsed")
def test_a_rehearsal_leaves_no_trace(pictures, whole, tmp_path):
    pretrain(data=pictures, out=tmp_path / "run", **SMALL)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize("backend", ["torch", "minkowski"])
def test_backends_train_alike(pictures, whole, tmp_path, backend):
    if reason := available_backends("cpu")[backend]:
        pytest.skip(reason)
    pretrain(data=pictures, out=tmp_path / "run", **SMALL, backend=backend)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.skipif(bool(available_backends("cpu")["minkowski"]), reason="MinkowskiEngine is not installed")
def test_minkowski_engine_computes_in_float32_uncompiled(pictures, tmp_path):
    options = SMALL | {"epochs": 1, "dtype": "auto"}
    pretrain(data=pictures, out=tmp_path / "run", **options, backend="minkowski")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "fp32"
    for more, message in (({"dtype": "bf16"}, "give `dtype=fp32`"), ({"compile": True}, "can't be compiled")):
        with pytest.raises(UserError, match=message):
            pretrain(data=pictures, out=tmp_path / "none", **options | more, backend="minkowski")
    assert not (tmp_path / "none").exists()


def test_compiled_model_trains_alike(pictures, whole, tmp_path):
    pretrain(data=pictures, out=tmp_path / "run", **SMALL | {"epochs": 1, "micro_batch_size": 6}, compile=True)
    pretrain(data=pictures, out=tmp_path / "plain", **SMALL | {"epochs": 1, "micro_batch_size": 6})
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_a_moving_average_is_evaluated_exported_and_resumed(pictures, colours, whole, tmp_path):
    run, options = tmp_path / "run", {"ema_decay": 0.5, "knn": colours, "eval_every": 1}
    pretrain(data=pictures, out=run, **SMALL, **options)
    assert losses(run) == losses(whole)
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row.keys() >= {"knn_top1", "ema_knn_top1"} for row in evaluations] == [True] * 4
    average = load_file(run / "exported-ema" / "model.safetensors")
    last = load_file(run / "exported" / "model.safetensors")
    assert average.keys() == last.keys()
    assert not all(torch.equal(average[key], value) for key, value in last.items())
    go_back(run, 8)
    pretrain(out=run, resume=True)
    again = load_file(run / "exported-ema" / "model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in average.items())


def test_the_moving_average_is_that_of_the_steps_weights(pictures, tmp_path):
    options = SMALL | {"epochs": 1, "save_every": 1, "keep_checkpoints": 9}
    pretrain(data=pictures, out=tmp_path / "run", **options, ema_decay=0.25)
    average = None
    for step in range(1, 5):
        weights = load_encoder(tmp_path / "run" / "checkpoints" / f"step-{step:08d}").state_dict()
        average = weights if average is None else {k: 0.25 * average[k] + 0.75 * v for k, v in weights.items()}
    found = load_file(tmp_path / "run" / "exported-ema" / "model.safetensors")
    assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in average.items())


def test_held_out_loss_has_its_own_curve_and_names_the_best_checkpoint(pictures, whole, tmp_path):
    run, val = tmp_path / "run", tmp_path / "val"
    val.mkdir()
    for number, file in enumerate(sorted(pictures.rglob("*.png"))[:5]):
        shutil.copy(file, val / f"{number}.png")
    options = SMALL | {"val": val, "eval_every": 1, "monitor": "val_loss", "micro_batch_size": 2}
    pretrain(data=pictures, out=run, **options)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)  # which images are held out changes nothing
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    found = [row["val_loss"] for row in evaluations]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 12]
    assert found[0] > found[-1]
    assert found[0] == pytest.approx(1.0, abs=0.02)
    Image.open(run / "loss.png").verify()
    best = min((value, row["step"]) for value, row in zip(found[1:], evaluations[1:], strict=True))[1]
    kept = load_encoder(run / "checkpoints" / f"step-{best:08d}").state_dict()
    exported = load_file(run / "exported" / "model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in exported.items())
    shutil.rmtree(val)
    val.mkdir()
    (val / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"none of the 1 images tried is what"):
        pretrain(data=pictures, out=tmp_path / "other", **options)


def test_deterministic_algorithms_are_asked_for(pictures, whole, tmp_path):
    subprocess.run(command(pictures, tmp_path / "run", "--deterministic"), check=True, capture_output=True)
    assert losses(tmp_path / "run") == losses(whole)


def test_pictures_of_a_long_run_are_thinned_out_evenly(tmp_path):
    for step in range(10, 2000, 10):
        (tmp_path / f"step-{step:08d}.png").touch()
        thin_out(tmp_path, 8)
    steps = [int(path.stem[5:]) for path in sorted(tmp_path.iterdir())]
    assert (len(steps), steps[0], steps[-1]) == (8, 10, 1990)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 2 * 1980 / 7


def test_two_ranks_give_one_ranks_losses(pictures, tmp_path):
    options = {"epochs": 5}
    pretrain(data=pictures, out=tmp_path / "one", **SMALL | options)
    arguments = command(pictures, tmp_path / "two", micro_batch_size=3, **options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(torchrun, check=True, capture_output=True, env=environment)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_to_torchrun_or_to_one_rank_stops_all_ranks_with_a_checkpoint(pictures, tmp_path, to_all):
    """Where it goes to one rank, torchrun sees this rank and the others end with code 75, and says so."""
    run, options = tmp_path / "run", {"epochs": 15, "save_every": 10_000, "log_every": 1}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [*torchrun, *command(pictures, run, **options)[1:]]
    process = start(arguments, run, 3, env=environment, stdout=subprocess.PIPE)
    if to_all:
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(children_of(process.pid)[-1], signal.SIGUSR2)
    process.communicate()
    assert process.returncode != 0
    stopped = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert f"stopped at step {stopped}; to go on: " in (run / "train.log").read_text()
    assert len(losses(run)) == stopped
    assert 3 <= stopped < 60
    pretrain(out=run, resume=True, micro_batch_size=5)
    pretrain(data=pictures, out=tmp_path / "whole", **SMALL | options)
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_bad_images_are_named_and_survived(pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for file in sorted(pictures.rglob("*.png"))[:37]:
        Image.open(file).save(data / f"{file.stem}.jpg")
    cut = (data / "00000.jpg").read_bytes()
    (data / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    (data / "text.png").write_text("just text")
    (data / os.fsdecode(b"caf\xe9.png")).write_text("just text")
    Image.new("1", (60_000, 60_000)).save(data / "bomb.png")
    pretrain(data=data, out=tmp_path / "run", **SMALL, max_bad_images=0.1)
    log = (tmp_path / "run" / "train.log").read_text()
    for name in ("cut.jpg", "text.png", "bomb.png"):
        assert log.count(f"another image: {name}") == 1
    assert log.count("another image: caf\\udce9.png") == 1
    with pytest.raises(UserError, match=r"of 41 images are unreadable, such as .*: raise `max_bad_images`"):
        pretrain(data=data, out=tmp_path / "strict", **SMALL)


def test_data_set_that_changed_is_not_resumed(pictures, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for file in pictures.rglob("*.png"):
        (data / file.name).write_bytes(file.read_bytes())
    pretrain(data=data, out=tmp_path / "run", **SMALL | {"epochs": 1})
    for file in sorted(data.iterdir())[5:]:  # fewer than a batch has
        file.unlink()
    with pytest.raises(UserError, match="are not those that the run"):
        pretrain(out=tmp_path / "run", resume=True)


def test_greyscale_and_non_square(pictures, tmp_path):
    options = SMALL | {"image_size": "32x48", "epochs": 1, "in_chans": 1, "dtype": "bf16"}
    pretrain(data=pictures, out=tmp_path / "run", **options)
    encoder = load_encoder(tmp_path / "run")
    assert (encoder.in_chans, encoder.image_size) == (1, (32, 48))


def test_mistakes_end_in_one_line(pictures, tmp_path, capsys):
    def wrong(data=pictures, out=tmp_path / "run", **options):
        options = {"data": data, "out": out, **SMALL, **options}
        line = fails(capsys, "pretrain", *flags({k: v for k, v in options.items() if v is not None}))
        assert not (tmp_path / "run").exists()
        return line

    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    assert "no such folder" in wrong(data=tmp_path / "missing")
    assert "no image files" in wrong(data=empty)
    assert "no image files" in wrong(data=tmp_path / "texts")
    assert "--data is missing" in wrong(data=None)
    assert "not a multiple of the 8-pixel patch" in wrong(image_size=100)
    assert "give pixels as" in wrong(image_size="big")
    assert "keeps no patch" in wrong(mask_ratio=0.99)
    assert "masks no patch" in wrong(mask_ratio=0)
    assert "invalid choice: 'giga'" in wrong(model="giga")
    assert "invalid choice: 'fast'" in wrong(backend="fast")
    assert "--device warp can't be used" in wrong(device="warp")
    small = flags({"data": pictures, "out": tmp_path / "run", **SMALL})
    assert "--cuda-graphs can't be used on cpu" in fails(capsys, "pretrain", *small, "--cuda-graphs")
    assert "--batch-size 64 is more than the 40 images" in wrong(batch_size=64)
    assert "--epochs must be greater than 0" in wrong(epochs=0)
    assert "--in-chans 2" in wrong(in_chans=2)
    assert "--device meta can't be used" in wrong(device="meta")
    assert "--mask-ratio must be a finite number, not nan" in wrong(mask_ratio="nan")
    assert "--lr must be a finite number, not inf" in wrong(lr="inf")
    assert "--seed must be" in wrong(seed=10**30)
    assert "--mask-patch-size must be greater than 0" in wrong(mask_patch_size=0)
    assert "File name too long" in wrong(out=tmp_path / ("x" * 300))
    assert "argument --epochs" in wrong(epochs="many")
    assert "is a file" in wrong(out=tmp_path / "file")
    assert "can't write" in wrong(out=tmp_path / "file" / "run")
    (empty / "thesis.pdf").write_text("x")
    assert "holds no pretraining run: choose another" in wrong(out=empty)
    assert "holds no pretraining run to resume" in fails(capsys, "pretrain", "--out", empty, "--resume")
    assert (empty / "thesis.pdf").exists()
    other = tmp_path / "another-project"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert "holds no pretraining run: choose another" in fails(
        capsys, "pretrain", "--data", pictures, "--out", other, "--overwrite"
    )
    assert "holds no pretraining run to resume" in fails(capsys, "pretrain", "--out", other, "--resume")


def test_mistakes_with_an_existing_run(pictures, whole, tmp_path, capsys):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    again = ["pretrain", "--data", pictures, "--out", run]
    assert "give --resume to go on or --overwrite to delete it" in fails(capsys, *again)
    assert "exclude each other" in fails(capsys, *again, "--resume", "--overwrite")
    assert "--model is femto but the run" in fails(capsys, *again, "--resume", "--model", "femto")
    assert "--seed is 9 but the run" in fails(capsys, *again, "--resume", "--seed", "9")
    assert "invalid choice: 'perhaps'" in fails(capsys, *again, "--resume", "perhaps")
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert "has done 12 steps, more than 4: raise --epochs" in fails(capsys, *again, "--resume", "--epochs", "1")
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / "trainer.pt").write_bytes(b"")
    line = fails(capsys, *again, "--resume")
    assert "has no whole checkpoint, step-00000012 for one: trainer.pt has 0 bytes and not" in line
    assert "put one back from a copy, or start anew with --overwrite" in line


def test_checkpoint_of_another_model_is_one_line(pictures, whole, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    subprocess.run(["cp", "-r", whole, run], check=True)
    pretrain(data=pictures, out=other, **SMALL | {"epochs": 1, "decoder_dim": 64})
    checkpoint = run / "checkpoints" / "step-00000012"
    subprocess.run(["rm", "-r", checkpoint], check=True)
    subprocess.run(["cp", "-r", other / "checkpoints" / "step-00000004", checkpoint], check=True)
    capsys.readouterr()
    assert "is of another model: size mismatch for" in fails(capsys, "pretrain", "--out", run, "--resume")


def test_overwrite_deletes_the_run_and_nothing_else(pictures, whole, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole, run], check=True)
    (run / "notes.md").write_text("mine")
    pretrain(data=pictures, out=run, **SMALL | {"epochs": 1}, overwrite=True)
    assert len(losses(run)) == 4
    assert (run / "notes.md").read_text() == "mine"
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_a_run_that_diverges_stops_and_goes_on_with_another_rate(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    pretrain(data=pictures, out=run, **SMALL | {"epochs": 1})
    with pytest.raises(UserError, match="were not finite in 3 steps in a row, up to step") as error:
        pretrain(out=run, resume=True, epochs=9, lr=1e15, max_nonfinite=3, log_every=1, save_every=100)
    assert "\n" not in str(error.value)
    log = (run / "train.log").read_text()
    assert "skipped, as loss or gradient were not finite: step" in log
    assert log.splitlines()[-1].endswith("lower --lr or --base-lr, or give --clip-grad 1, and go on with --resume")
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == ["step-00000004"]
    pretrain(out=run, resume=True, epochs=2, lr=1e-3)
    assert all(np.isfinite(losses(run)))
    assert len(losses(run)) == 8


def test_mistake_in_the_middle_of_a_run_ends_the_process(pictures, tmp_path):
    arguments = command(pictures, tmp_path / "run", lr=1e12, log_every=1)
    process = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert "not finite" in process.stderr or "the loss is nan" in process.stderr


def rows(run, name="metrics"):
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_MACHINE} for row in found]


def test_pretraining_goes_on_from_weights_and_looks_at_neighbours(pictures, encoder, tmp_path):
    small = {"model": "atto", "image_size": 32, "stem_stride": 1, "batch_size": 10, "dtype": "fp32", "num_workers": 0}
    data = tmp_path / "labelled"
    for split in ("train", "val"):
        for folder in pictures.iterdir():
            (data / split / folder.name).mkdir(parents=True)
            first = sorted(folder.iterdir())[split == "val"]
            (data / split / folder.name / first.name).symlink_to(first)
    run = tmp_path / "run"
    pretrain(data=pictures, out=run, init=encoder, knn=data, eval_every=1, epochs=2, lr=1e-9, **small)
    assert [row["step"] for row in rows(run, "evaluations")] == [0, 4, 8]
    assert all(0 <= row["knn_top1"] <= 1 for row in rows(run, "evaluations"))
    assert "new decoder" in (run / "train.log").read_text()
    state, after = load_file(encoder / "model.safetensors"), load_file(run / "exported" / "model.safetensors")
    assert all((after[key] - value).abs().max() < 1e-6 for key, value in state.items())

    again = tmp_path / "again"
    pretrain(data=pictures, out=again, init=run, epochs=1, lr=1e-9, batch_size=10, dtype="fp32", num_workers=0)
    assert "going on from the encoder and decoder" in (again / "train.log").read_text()
    models = [load_file(r / "checkpoints" / f"step-{s:08d}" / "model.safetensors") for r, s in ((run, 8), (again, 4))]
    assert all((models[1][key] - value).abs().max() < 1e-6 for key, value in models[0].items())
    for options, message in (
        ({"model": "femto"}, "give `model=atto`"),
        ({"stem_stride": 2}, "give `stem_stride=1`"),
        ({"layer_scale": True}, "has `layer_scale` False, not True: leave `layer_scale` out"),
        ({"grn": False}, "has `grn` True, not False: give `grn=True`"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(data=pictures, out=tmp_path / "x", init=encoder, epochs=1, **small | {"image_size": 64} | options)
    with pytest.raises(UserError, match="has no folder train"):
        pretrain(data=pictures, out=tmp_path / "x", knn=pictures, epochs=1, **small)
    assert not (tmp_path / "x").exists()


def test_variants_for_comparison_are_trained_exported_and_fine_tuned(pictures, tmp_path, capsys):
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    options = ["--image-size", 32, "--stem-stride", 1, "--num-workers", 0, "--epochs", 1]
    variant = ["--no-grn", "--layer-scale", "--no-sparse", "--batch-size", 10]
    main(list(map(str, ["pretrain", "--data", pictures, "--out", run, *options, *variant])))
    encoder = load_encoder(run)
    assert (encoder.grn, encoder.layer_scale) == (False, True)
    assert "can't be converted for timm: timm has no blocks without GRN" in (run / "train.log").read_text()
    few = ["--batch-size", 20, "--val-split", 0.5, "--num-workers", 0, "--epochs", 1, "--ema-decay", 0]
    main(list(map(str, ["finetune", "--data", pictures, "--init", run, "--out", tuned, *few])))
    assert load_classifier(tuned).stages[0][0].gamma.shape == (40,)
    wrong = ["pretrain", "--data", pictures, "--init", run, "--out", tmp_path / "x", *options, "--batch-size", 10]
    assert "has --grn False, not True: give --no-grn" in fails(capsys, *wrong)
    assert not (tmp_path / "x").exists()


def test_a_run_stopped_before_its_first_checkpoint_starts_from_its_weights_again(pictures, encoder, tmp_path):
    options = SMALL | {"epochs": 1, "lr": 1e-12}
    pretrain(data=pictures, out=tmp_path / "run", init=encoder, **options)
    subprocess.run(["rm", "-r", tmp_path / "run" / "checkpoints"], check=True)
    pretrain(out=tmp_path / "run", resume=True)
    state, after = (load_file(f / "model.safetensors") for f in (encoder, tmp_path / "run" / "exported"))
    assert all((after[key] - value).abs().max() < 1e-6 for key, value in state.items())


def test_a_run_says_whether_it_learns(pictures, tmp_path, monkeypatch):
    """Its features are checked in a small part of its time, and resuming it changes none of the numbers."""
    run = tmp_path / "run"
    monkeypatch.setattr(feature_check, "SHARE", 1)  # or as few steps could afford no check
    options = SMALL | {"epochs": 30, "eval_every": 10, "batch_size": 20, "save_every": 20, "keep_checkpoints": 9}
    pretrain(data=pictures, out=run, **options)
    evaluations = (run / "evaluations.jsonl").read_text()
    rows = [json.loads(line) for line in evaluations.splitlines()]
    assert [row["step"] for row in rows] == [0, 20, 40, 60]
    assert all(1 <= row["effective_rank"] <= 40 and 0 < row["channel_distance"] <= 0.5 for row in rows)
    assert sum(name.startswith("distance_") for name in rows[0]) == 12
    said = re.findall(r"(learning|too early to say|broken): .*", (run / "train.log").read_text())
    assert said[:2] == ["too early to say"] * 2
    assert len(said) == 3
    go_back(run, 40)
    pretrain(out=run, resume=True)
    assert (run / "evaluations.jsonl").read_text() == evaluations


def test_a_range_test_is_not_judged(pictures, tmp_path):
    pretrain(data=pictures, out=tmp_path / "run", **SMALL | {"epochs": None}, lr_range="1e-6,1", max_steps=10)
    log = (tmp_path / "run" / "train.log").read_text()
    assert not re.search("learning: |too early|broken", log)
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
