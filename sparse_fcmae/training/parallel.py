"""How a model is spread over the processes of a run: a copy on each, or a shard on each.

ddp: each rank has the whole model, and gradients are averaged (`DistributedDataParallel`). fsdp: each rank has a part
of every parameter, gradient and moment, and a block's parameters are gathered for as long as it runs (`fully_shard`,
with each block a unit; Zhao et al., 2023). hsdp: each machine has a copy, of which its ranks have a shard each.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from sparse_fcmae.model.convnext import Block
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.shards import whole
from sparse_fcmae.training.config import RunConfig


def shards(config: RunConfig, ranks: Ranks) -> bool:
    """Whether a run shards its model, for which it needs several processes.

    Raises UserError for options that do not go together.
    """
    several_gpus = ranks.world > 1 and ranks.device.type == "cuda"
    if config.cpu_offload and (config.parallel == "ddp" or not several_gpus):
        raise UserError("`cpu_offload` goes with `parallel=fsdp` or `parallel=hsdp` on several GPUs: leave it out")
    sharded = config.parallel != "ddp" and ranks.world > 1
    if sharded and not hasattr(torch.distributed.checkpoint, "HuggingFaceStorageWriter"):
        raise UserError(f"`parallel={config.parallel}` needs PyTorch 2.8 or newer, and this is {torch.__version__}")
    return sharded


def spread(config: RunConfig, ranks: Ranks) -> list[str]:
    """What a run's log says of how its model is spread over several processes."""
    if config.parallel == "ddp":
        return []
    if ranks.world == 1:
        return [f"--parallel {config.parallel} does nothing in one process, which has the whole model"]
    return [f"{config.parallel}: each of {ranks.world} processes has a shard of the model"]


def device_of_new_model(config: RunConfig, ranks: Ranks) -> torch.device:
    """Where a rank makes the model that it gives to `place`.

    Of a model that will be sharded the main rank makes the weights, and the others the shapes alone.
    """
    return torch.device("meta" if shards(config, ranks) and not ranks.main else "cpu")


def place(model: nn.Module, config: RunConfig, ranks: Ranks, methods: tuple[str, ...] = ()) -> None:
    """Moves a model to this rank's device, or this rank's shard of it. All ranks call it together.

    Of a model that is sharded, `forward` and the methods named gather what they need.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.checkpointed = config.grad_checkpointing
    if not shards(config, ranks):
        model.to(ranks.device)
        return
    weights = dict(model.state_dict())
    model.to("meta")
    options = {
        "mesh": _mesh(config, ranks),
        "offload_policy": CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    }
    # a block gets its parameters as the matrix products take them; what is around the blocks is small, and stays
    # float32, as do the features between them
    products = torch.bfloat16 if config.dtype == "bf16" else None
    mixed = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=mixed, **options)
    # gathered again in each pass, so that between passes there are shards alone for who looks at the parameters
    fully_shard(model, reshard_after_forward=True, **options)
    for method in methods:
        register_fsdp_forward_method(model, method)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # which nobody writes into
    model.to_empty(device="cpu" if config.cpu_offload else ranks.device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _mesh(config: RunConfig, ranks: Ranks) -> DeviceMesh:
    """The ranks in a row or, for hsdp, in a row for each machine."""
    if config.parallel == "fsdp":
        return init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("ranks",))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    if len(set(ranks.gather(here))) > 1:
        raise UserError("`parallel=hsdp` needs equally many processes on each machine")
    return init_device_mesh(ranks.device.type, (ranks.world // here, here), mesh_dim_names=("machines", "ranks"))


def averaging(objective: nn.Module, ranks: Ranks) -> nn.Module:
    """A module whose gradients are averaged over the ranks.

    That is the objective itself in a run of one process, and where it holds a model that is sharded.
    """
    if ranks.world == 1 or any(is_sharded(module) for module in objective.children()):
        return objective
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def accumulating(objective: nn.Module, last: bool) -> Iterator[None]:
    """Has ranks exchange gradients in the backward pass of a step's last micro-batch, as far as memory allows.

    Copies of a model do so once a step. Shards are added up over the ranks of a machine in each backward pass, as the
    sums would be as large as the whole model otherwise, and over machines once a step.
    """
    for module in objective.children():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(last)
    waiting = not last and isinstance(objective, DistributedDataParallel)
    with objective.no_sync() if waiting else nullcontext():
        yield


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank has a shard of the model."""
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """A model's state dict on the CPU, for the main rank; for the others it is empty. All ranks call it together."""
    state = {}
    for name, value in model.state_dict().items():  # one after the other, so that a GPU has one of them whole at a time
        tensor = whole(value)
        if ranks.main:
            state[name] = tensor
    return state
