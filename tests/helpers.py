"""Independent references and what several tests share."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_fcmae.cli import main
from sparse_fcmae.runtime.options import flag

OF_MACHINE = ("images_per_second", "data_wait", "memory_gb", "tflops", "mfu")  # what metrics have that no run repeats


def relative_error(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius error of a against b, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Moves every parameter away from its initial value, so that GRN and biases take part."""
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def masks(rows: int, cols: int) -> dict[str, Tensor]:
    """Masks [3, rows, cols] that reach the corners: ragged, borders empty, whole images empty, none, all but one."""
    generator = torch.Generator().manual_seed(1)
    ragged = torch.rand(3, rows, cols, generator=generator) < torch.tensor([0.2, 0.6, 0.9])[:, None, None]
    ragged[:, 0, -1] = False
    borders = torch.rand(3, rows, cols, generator=generator) < 0.3
    borders[:, 0], borders[:, -1], borders[:, :, 0] = True, True, True
    borders[0, rows // 2, cols // 2] = False
    empty = ragged.clone()
    empty[0], empty[2] = True, True
    single = torch.ones(3, rows, cols, dtype=torch.bool)
    single[:, -1, 0] = False
    return {"ragged": ragged, "borders": borders, "empty": empty, "none": torch.zeros_like(ragged), "single": single}


def dense_encoder(state: dict[str, Tensor], images: Tensor, mask: Tensor, scope: str = "image") -> Tensor:
    """ConvNeXt V2's encoder with the mask multiplied in, written from the paper alone: [B, D, rows, cols]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def conv(x: Tensor, name: str, **options) -> Tensor:
        x = F.conv2d(x.permute(0, 3, 1, 2), state[f"{name}.weight"], state[f"{name}.bias"], **options)
        return x.permute(0, 2, 3, 1)

    x = images.permute(0, 2, 3, 1)
    for stage in range(4):
        if stage == 0:
            stride = state["downsample_layers.0.0.weight"].shape[-1]
            x = norm(conv(x, "downsample_layers.0.0", stride=stride), "downsample_layers.0.1")
        else:
            x = norm(x, f"downsample_layers.{stage}.0")
            x = conv(x, f"downsample_layers.{stage}.1", stride=2)
        keep = ~mask.repeat_interleave(8 >> stage, 1).repeat_interleave(8 >> stage, 2)[..., None]
        block = 0
        while f"stages.{stage}.{block}.norm.weight" in state:
            name = f"stages.{stage}.{block}"
            y = norm(conv(x * keep, f"{name}.dwconv", padding=3, groups=x.shape[-1]), f"{name}.norm")
            y = F.gelu(F.linear(y, state[f"{name}.pwconv1.weight"], state[f"{name}.pwconv1.bias"]))
            if f"{name}.grn.gamma" in state:
                y = dense_grn(y, keep, state[f"{name}.grn.gamma"], state[f"{name}.grn.beta"], scope)
            y = F.linear(y, state[f"{name}.pwconv2.weight"], state[f"{name}.pwconv2.bias"])
            x = x + state.get(f"{name}.gamma", 1) * y
            block += 1
    return (x * keep).permute(0, 3, 1, 2)


def dense_grn(y: Tensor, keep: Tensor, gamma: Tensor, beta: Tensor, scope: str) -> Tensor:
    """Global response normalisation of [B, H, W, C], pooled where `keep` is true."""
    squares = ((y * keep) ** 2).sum((0, 1, 2) if scope == "batch" else (1, 2), keepdim=True)
    response = squares.clamp_min(1e-38) ** 0.5
    return gamma * (y * response / (response.mean(-1, keepdim=True) + 1e-6)) + beta + y


def flags(options: dict[str, object]) -> list[str]:
    """Options as the command line has them."""
    return [part for name, value in options.items() for part in (flag(name), str(value))]


def fails(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line that the command line prints for a mistake."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def go_back(run, step):
    """Deletes a run's checkpoints behind a step, as if the run had been killed after it."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()


def flip_bytes(path, count=64):
    """Flips bytes in the middle of a file, whose size stays."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + count] = bytes(255 - value for value in content[middle : middle + count])
    path.write_bytes(content)


def children_of(process):
    """The numbers of a process's children, in the order in which they were started, from Linux's /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            behind_name = status.read_text().rpartition(")")[2].split()
            if int(behind_name[1]) == process:
                found.append(int(status.parent.name))
    return sorted(found)
