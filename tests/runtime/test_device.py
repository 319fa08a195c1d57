import pytest
import torch

from sparse_fcmae import UserError
from sparse_fcmae.runtime import device as module
from sparse_fcmae.runtime.device import choose_device, cores_per_process, loader_processes


@pytest.mark.parametrize(("cores", "processes", "each"), [(1, 1, 1), (8, 1, 8), (8, 3, 2), (2, 8, 1), (128, 2, 16)])
def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch, cores, processes, each):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cores_per_process() == each
    assert loader_processes(torch.device("cpu"), None) == max(1, each // 4)
    assert loader_processes(torch.device("cuda"), None) == each
    assert loader_processes(torch.device("cuda"), 0) == 0


def test_devices_that_can_not_be_used():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("warp", "meta", "xpu"):
        with pytest.raises(UserError, match=f"`device` {name} can't be used, choose auto, cpu or cuda: ") as error:
            choose_device(name)
        assert "\n" not in str(error.value)
