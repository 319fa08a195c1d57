"""What a run is said to take against what it takes, as far as this machine can run it."""

import re
import subprocess
import sys

import pytest
from helpers import fails

from sparse_fcmae.cli import main
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.tasks.config import PlanConfig
from sparse_fcmae.tasks.plan import _model, memory, plan

PROGRAM = """
import re
import sys
import torch
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.model.fcmae import FCMAE
from sparse_fcmae.tasks.pretraining import PretrainingObjective
from sparse_fcmae.training.optim import adamw
from sparse_fcmae.training.step import TrainStep

name, images, bf16 = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "bf16"
model = FCMAE(name)
objective = PretrainingObjective(model, ImageFormat.imagenet(3), model.num_visible((224, 224)))
step = TrainStep(objective, adamw(model, 0.05, (0.9, 0.95)), images_per_rank=2 * images, bf16=bf16)
for _ in range(2):
    for last in (False, True):
        pixels = torch.randint(0, 256, (images, 224, 224, 3), dtype=torch.uint8)
        step.add(pixels, model.draw_mask(images, (224, 224)), last=last)
    step.finish()
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory a process has taken at most")
@pytest.mark.parametrize(("name", "images", "dtype"), [("atto", 64, "fp32"), ("tiny", 16, "bf16")])
def test_memory_is_within_15_per_cent_of_what_steps_take(name, images, dtype):
    command = [sys.executable, "-c", PROGRAM, name, str(images), dtype]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    config = PlanConfig(model=name, dtype=dtype, device="cpu")
    assert memory(config, _model(config), "ddp", images).together == pytest.approx(measured, rel=0.15)


def test_what_is_sharded_is_divided_and_what_is_not_is_not():
    config = PlanConfig(model="huge", gpus=64, dtype="fp32")
    model = _model(config)
    ddp, fsdp, hsdp = (memory(config, model, way, 8) for way in ("ddp", "fsdp", "hsdp"))
    for name in ("weights", "gradients", "moments"):
        assert getattr(ddp, name) == 64 * getattr(fsdp, name) == 8 * getattr(hsdp, name)
    assert ddp.moments == 2 * ddp.weights == 8 * sum(p.numel() for p in model.parameters())
    assert ddp.gathered == 0 < fsdp.gathered == hsdp.gathered < ddp.weights
    assert ddp.images == fsdp.images == hsdp.images
    assert ddp.together == ddp.weights + ddp.gradients + ddp.moments + ddp.images + ddp.pytorch


def test_time_and_sizes_follow_from_the_counts(capsys):
    main(
        [
            "plan",
            "--model",
            "base",
            "--gpus",
            "4",
            "--images",
            "1000000",
            "--epochs",
            "100",
            "--batch-size",
            "1000",
            "--images-per-second",
            "500",
        ]
    )
    text = capsys.readouterr().out
    assert "base, 91.9 M parameters with the decoder, images of 224x224, bf16\n" in text
    assert "100,000 steps of 1000 images, 250 on each of 4 devices, 128 at once\n" in text
    assert "500 images/s a device, 2,000 together, 0.50 s a step\n" in text
    assert "13 h 53 min, 56 GPU hours\n" in text  # 1e8 images at 2000 a second
    assert "checkpoint   1.10 GB" in text
    assert "220 MB/s of 110 kB an image; 0.11 TB in all" in text
    assert [line.split()[0] for line in text.splitlines() if re.match(r"(ddp|fsdp|hsdp) ", line)] == ["ddp", "fsdp"]


def test_speed_is_a_share_of_the_peak_over_the_counted_operations():
    text = plan(model="base", tflops=100.0, efficiency=0.5, batch_size=64, epochs=1)
    flops = float(re.search(r"operations\s+([\d.]+) GFLOP", text)[1])
    assert float(re.search(r"speed\s+([\d,]+) images", text)[1].replace(",", "")) == pytest.approx(
        50e3 / flops, rel=0.01
    )


def test_a_peak_that_is_not_known_is_asked_for(capsys):
    assert "give --images-per-second as measured on one, or" in fails(capsys, "plan", "--device", "cpu")
    assert "for --device cuda and --dtype fp32 is not known" in fails(capsys, "plan", "--dtype", "fp32")
    assert "--images 100 are less than a step's 4096" in fails(
        capsys, "plan", "--images", "100", "--batch-size", "4096"
    )
    assert plan(device="cpu", images_per_second=100.0)


def test_only_what_can_be_had_is_listed():
    lines = plan(gpus=12, batch_size=1200).splitlines()  # 8 and 4 on two machines
    assert [line.split()[0] for line in lines if re.match(r"(ddp|fsdp|hsdp) ", line)] == ["ddp", "fsdp"]


@pytest.mark.parametrize("name", [*SIZES, "giant", "gigantic"])
def test_every_size_has_a_plan(name):
    assert plan(model=name, gpus=16, images=4_000_000_000).startswith(f"{name}, ")


def test_what_does_not_fit_is_one_line(capsys):
    assert "can't be divided evenly among 3 devices: choose 9" in fails(
        capsys, *["plan", "--gpus", "3", "--batch-size", "8"]
    )
    assert "--dims 1,2: give four numbers" in fails(capsys, *["plan", "--dims", "1,2"])
    assert "is not a multiple of the 32-pixel patch" in fails(capsys, *["plan", "--image-size", "100"])
