"""Batches that are on the device before they are needed."""

from collections.abc import Iterator

import torch

from sparse_fcmae.data.batches import Batch


def prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches whose pixels are on a device. On a GPU each is copied while the one before it is computed with.

    The copies run on a stream of their own, from pinned memory. So one more batch is in the GPU's memory, and the first
    comes when two are loaded. On a CPU batches are passed on as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = batch._replace(pixels=batch.pixels.to(device, non_blocking=True))
            done = stream.record_event()
        if ahead:
            yield _ready(*ahead, device)
        ahead = copied, done
    if ahead:
        yield _ready(*ahead, device)


def _ready(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """A batch that what is launched from now on may use, without the host's waiting for its copy."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    batch.pixels.record_stream(current)  # or its memory could be given away while it is still used
    return batch
