"""Tensors of which each process holds a part, in a folder of safetensors files: one of each process.

They are written and read by torch.distributed.checkpoint, so that any number of processes can read what any other
number wrote. In a file's metadata is what part of each tensor it has. Nothing is pickled.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line


def save_shards(tensors: dict[str, Tensor], folder: Path, group: ProcessGroup) -> None:
    """Writes this process's parts of tensors, DTensors, into a folder. All processes of the group call it together.

    Where it fails in one of them it raises UserError in all, with what is wrong.
    """
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(tensors, storage_writer=writer, process_group=group)
    except checkpoint.CheckpointException as error:
        failed = next(iter(error.failures.values()))[0]
        raise UserError(f"can't write {folder}: {getattr(failed, 'strerror', None) or one_line(failed)}") from None


def load_shards(folder: Path, like: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors in a folder whose names begin with `prefix`.

    One that `like` has under its name, as a DTensor of the same shape, comes as such a DTensor, for which this
    process's part alone is read. The others come whole, on the CPU. Each process reads by itself. Raises UserError
    where files are missing or damaged.
    """
    from torch.distributed import checkpoint

    try:
        reader, targets = checkpoint.HuggingFaceStorageReader(str(folder)), {}
        for name, found in reader.read_metadata().state_dict_metadata.items():
            if name.startswith(prefix):
                own, dtype = like.get(name), found.properties.dtype
                sharded = isinstance(own, DTensor) and own.shape == found.size
                targets[name] = torch.empty_like(own, dtype=dtype) if sharded else torch.empty(found.size, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load(targets, storage_reader=reader, no_dist=True)
    except (Exception, checkpoint.CheckpointException) as error:  # safetensors and PyTorch raise many types
        raise UserError(f"{folder} can't be read: {one_line(error)[:200]}") from None
    return targets


def laid_out(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of a whole tensor, if `like` is a DTensor of the same shape; else the tensor as it is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or like.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered where it is a DTensor, which all processes do together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
