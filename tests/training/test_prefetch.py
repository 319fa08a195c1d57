import torch

from sparse_fcmae.data.batches import Batch
from sparse_fcmae.training.prefetch import prefetched


def test_on_a_cpu_batches_are_passed_on_when_they_are_asked_for():
    drawn = []

    def batches():
        for number in range(3):
            drawn.append(number)
            yield Batch(torch.full((1, 2, 2, 3), number, dtype=torch.uint8), torch.tensor([number]), [])

    found = prefetched(batches(), torch.device("cpu"))
    for number in range(3):
        batch = next(found)
        assert (drawn, batch.index.tolist()) == (list(range(number + 1)), [number])
    assert list(found) == []
