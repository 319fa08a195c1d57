"""Which GPU a process takes, on a machine whose GPUs are pretended."""

import pytest
import torch

from sparse_fcmae.runtime import device as module
from sparse_fcmae.runtime.device import choose_device, cores_per_process, default_device


@pytest.fixture
def gpus(monkeypatch):
    """Has there be GPUs; the list of those that were made the current one."""
    current, zeros = [], torch.zeros

    def on_cpu(*size, device):
        return zeros(*size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(module.torch, "zeros", on_cpu)
    return current


@pytest.mark.parametrize(
    ("name", "rank", "expected"), [("cuda", 0, 0), ("cuda", 3, 3), ("auto", 2, 2), ("cuda:1", 3, 1), ("cuda:0", 3, 0)]
)
def test_each_process_takes_its_own_gpu_unless_one_is_named(gpus, name, rank, expected):
    assert choose_device(name, rank) == torch.device("cuda", expected)
    assert gpus == [torch.device("cuda", expected)]


def test_the_cpu_is_no_gpu(gpus, monkeypatch):
    assert choose_device("cpu", 1) == torch.device("cpu")
    assert gpus == []
    assert default_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == choose_device("auto", 1) == torch.device("cpu")


@pytest.mark.parametrize(("counted", "expected"), [(6, 6), (40, 16), (None, 1)])
def test_cores_where_the_system_does_not_say_which_a_process_may_use(monkeypatch, counted, expected):
    monkeypatch.delattr(module.os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(module.os, "cpu_count", lambda: counted)
    assert cores_per_process() == expected
