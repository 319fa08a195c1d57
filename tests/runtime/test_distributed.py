import os
import subprocess
import sys

import torch

from sparse_fcmae.runtime.distributed import Ranks, process_group
from sparse_fcmae.training.parallel import averaging

PROGRAM = """
import torch
import atexit
import time
from sparse_fcmae.runtime.distributed import end_process, process_group
from sparse_fcmae.training.parallel import averaging
from sparse_fcmae.runtime.errors import UserError

def refuse():
    raise UserError("in use")

with process_group("cpu") as ranks:
    assert ranks.main == (ranks.rank == 0)
    gathered = ranks.gather({"rank": ranks.rank})
    mean = ranks.mean(torch.tensor([1.0, 10.0]) * (ranks.rank + 1)).tolist()
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(layer.weight)
    averaged = averaging(layer, ranks)
    averaged(torch.tensor([[float(ranks.rank)]])).sum().backward()
    ranks.barrier()
    refused = None
    try:
        ranks.by_main(refuse)
    except UserError as error:
        refused = str(error)
    refused = ranks.gather(refused)

    def look():
        time.sleep(0.5 * ranks.main)
        return ranks.rank, time.monotonic()

    (first, then), (second, later) = ranks.gather(ranks.main_first(look))
    assert (first, second) == (0, 1) and later >= then
    try:
        ranks.main_first(lambda: refuse() if ranks.main else None)  # raised on all
        heard = None
    except UserError as error:
        heard = str(error)
    assert ranks.gather(heard) == ["in use", "in use"]
    ranks.by_main(lambda: print("on one rank"))
    if ranks.main:
        print(gathered, mean, layer.weight.grad.item(), refused)
assert not torch.distributed.is_initialized()
if ranks.main:
    atexit.register(lambda: print("at exit"))
end_process(0)
"""


def test_two_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "on one rank\n[{'rank': 0}, {'rank': 1}] [1.5, 15.0] 0.5 ['in use', 'in use']\nat exit\n"


def test_one_process_needs_no_group():
    with process_group("cpu") as ranks:
        assert ranks == Ranks(0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
        assert ranks.gather(3) == [3]
        assert ranks.main_first(lambda: 4) == 4
        assert ranks.mean(torch.ones(2)).tolist() == [1, 1]
        layer = torch.nn.Linear(1, 1)
        assert averaging(layer, ranks) is layer
        ranks.barrier()
