import copy

import pytest
import torch
from torch import nn

from sparse_fcmae import UserError
from sparse_fcmae.training.step import TrainStep


class Objective(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, y):
        return (self.layer(x) - y).square().mean()


@pytest.mark.parametrize("clip_grad", [None, 0.1])
@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1] * 7])
def test_micro_batches_of_any_size_are_one_step_of_the_whole_batch(sizes, clip_grad):
    ours = Objective().double()
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9) for model in (ours, theirs)]
    step = TrainStep(ours, optimizers[0], images_per_rank=7, clip_grad=clip_grad)
    for _ in range(2):
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        for i, part in enumerate(parts):
            step.add(*part, last=i == len(parts) - 1)
        loss, norm = step.finish()

        expected = theirs(x, y)
        expected.backward()
        exact = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
        if clip_grad:
            for parameter in theirs.parameters():
                parameter.grad *= min(1, clip_grad / (exact + 1e-6))
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert all(p.grad is None for p in ours.parameters())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_autocast_is_on_where_it_is_asked_for():
    seen = []

    class Watching(Objective):
        def forward(self, x, y):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super().forward(x, y)

    model = Watching()
    for bf16 in (True, False):
        step = TrainStep(model, torch.optim.SGD(model.parameters()), images_per_rank=1, bf16=bf16)
        step.add(torch.ones(1, 3), torch.ones(1, 2), last=True)
        assert {value.dtype for value in step.finish()} == {torch.float32}
    assert seen[0] == (True, torch.bfloat16)
    assert not seen[1][0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(fused, value):
    """Nor does it count in the moments' corrections: the next step is that of a run without it."""
    models = [Objective() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    for model, with_fault in zip(models, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        step = TrainStep(model, optimizer, images_per_rank=4, clip_grad=0.5)
        for number, (x, y) in enumerate(inputs):
            if with_fault and number == 1:
                before = [p.detach().clone() for p in model.parameters()]
                step.add(x * value, y, last=True)
                loss, norm = step.finish()
                assert not loss.isfinite()
                assert not norm.isfinite()
                assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            step.add(x, y, last=True)
            assert all(found.isfinite() for found in step.finish())
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


class Greedy(nn.Module):
    """Needs more memory than there is for more than two images."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore text")
        return self.weight * images.mean()


def test_a_batch_that_does_not_fit_is_named_with_what_may():
    greedy = Greedy()
    step = TrainStep(greedy, torch.optim.AdamW(greedy.parameters()), images_per_rank=6)
    with pytest.raises(UserError) as error:
        step.add(torch.ones(6, 1), last=True)
    assert str(error.value) == (
        "6 images at once do not fit into the memory of cpu: give `micro_batch_size=3`, which changes rounding at most"
        ", and go on with `resume=auto`: CUDA out of memory. Tried to allocate 2 GiB."
    )
    step.add(torch.ones(2, 1), last=True)
    assert step.finish().loss == pytest.approx(1 / 3)
