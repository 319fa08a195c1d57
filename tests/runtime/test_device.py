from types import SimpleNamespace

import pytest
import torch

from sparse_fcmae import UserError
from sparse_fcmae.runtime import device as module
from sparse_fcmae.runtime.device import choose_device, cores_per_process, default_device, loader_processes


@pytest.mark.parametrize(("cores", "processes", "each"), [(1, 1, 1), (8, 1, 8), (8, 3, 2), (2, 8, 1), (128, 2, 16)])
def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch, cores, processes, each):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cores_per_process() == each
    assert loader_processes(torch.device("cpu"), None, 0) == (max(1, each // 4), [])
    assert loader_processes(torch.device("cuda"), None, 0) == (each, [])
    assert loader_processes(torch.device("cuda"), 0, 1 << 60) == (0, [])


def test_devices_that_can_not_be_used():
    assert choose_device("cpu") == torch.device("cpu")
    found = {"warp": "auto, cpu or cuda", "meta": "auto, cpu or cuda"}
    for name, others in (found if torch.cuda.is_available() else found | {"cuda": "auto or cpu"}).items():
        with pytest.raises(UserError, match=f"`device` {name} can't be used, choose {others}: ") as error:
            choose_device(name)
        assert "\n" not in str(error.value)


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


def test_loader_processes_fit_into_shared_memory(monkeypatch):
    monkeypatch.setattr(module, "cores_per_process", lambda: 16)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=64_000_000))
    cuda = torch.device("cuda")
    assert loader_processes(cuda, None, 1_000_000) == (16, [])
    assert loader_processes(cuda, None, 19_000_000) == (
        1,
        [
            "/dev/shm has 64 MB left, of which 16 loader processes would take 912: make it larger (docker run "
            "--shm-size=1g), or the batches smaller; until then 1 loader process"
        ],
    )
    count, (line,) = loader_processes(cuda, None, 30_000_000)
    assert count == 0
    assert line.endswith("until then no loader process")
    with pytest.raises(UserError, match=r"4 loader processes would take 228: .*, or give `num_workers=1`"):
        loader_processes(cuda, 4, 19_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loader_processes(cuda, None, 10_000_000)[0] == 1
    monkeypatch.setattr(module, "SHARED_MEMORY", "/nowhere")
    assert loader_processes(cuda, None, 1 << 60) == (16, [])
