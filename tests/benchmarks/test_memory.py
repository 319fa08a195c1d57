import sys

import pytest
import torch

from sparse_fcmae.benchmarks import memory


def test_memory_is_refused_not_promised():
    with memory.failing_beyond_memory():
        assert memory.within_memory(lambda: torch.zeros(1 << 42)) is None
        assert memory.within_memory(lambda: torch.zeros(8).sum().item()) == 0
    with pytest.raises(RuntimeError, match="shape"):
        memory.within_memory(lambda: torch.zeros(2).view(3))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's account")
def test_peak_memory():
    found = memory.peak_megabytes(lambda: [torch.ones(20_000_000) for _ in range(3)], torch.device("cpu"))
    assert found == pytest.approx(240, rel=0.2)
