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
    """Needs more memory than there is for more than so many images, and finds out in the forward or backward pass."""

    def __init__(self, most, backward=False):
        super().__init__()
        self.layer, self.most, self.backward = nn.Linear(3, 2), most, backward

    def forward(self, x, y):
        loss = (self.layer(x) - y).square().mean()
        if len(x) > self.most:
            if not self.backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore text")
            self.layer.weight.register_hook(self.fail)
        return loss

    def fail(self, gradient):
        if self.most < 9:
            self.most = 9  # the hook stays
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("sizes", [[8], [5, 3]])
def test_a_batch_that_does_not_fit_is_divided_and_gives_the_same_step(backward, sizes):
    greedy, plain = Greedy(2, backward), Objective()
    plain.layer.load_state_dict(greedy.layer.state_dict())
    steps = [
        TrainStep(m, torch.optim.SGD(m.parameters(), lr=0.5), images_per_rank=8, divides=True) for m in (greedy, plain)
    ]
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    for _ in range(2):
        results = []
        for step in steps:
            parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
            for i, part in enumerate(parts):
                step.add(*part, last=i == len(parts) - 1)
            results.append(step.finish())
        assert results[0].loss.item() == pytest.approx(results[1].loss.item())
        assert results[0].grad_norm.item() == pytest.approx(results[1].grad_norm.item())
    assert torch.allclose(greedy.layer.weight, plain.layer.weight)
    assert steps[0].most == (sizes[0] // 2 if backward else 2)
    assert steps[1].most == 8


def test_a_batch_that_can_t_be_divided_is_named_with_what_may_help():
    step = TrainStep(greedy := Greedy(0), torch.optim.SGD(greedy.parameters()), images_per_rank=6, divides=True)
    with pytest.raises(UserError) as error:
        step.add(torch.ones(6, 3), torch.ones(6, 2), last=True)
    assert str(error.value) == (
        "1 images at once do not fit into the memory of cpu: give `grad_checkpointing=True`, and go on with "
        "`resume=True`: CUDA out of memory. Tried to allocate 2 GiB."
    )
    step = TrainStep(greedy := Greedy(4), torch.optim.SGD(greedy.parameters()), images_per_rank=10, divides=True)
    step.add(torch.ones(4, 3), torch.ones(4, 2), last=False)
    with pytest.raises(
        UserError, match="6 images at once do not fit into the memory of cpu: give `micro_batch_size=3`"
    ):
        step.add(torch.ones(6, 3), torch.ones(6, 2), last=True)  # the gradients of the first would be lost


class Noisy(Greedy):
    """Draws at random, as an objective that augments images does."""

    def forward(self, x, y):
        return super().forward(x + torch.rand_like(x), y)


def test_what_is_drawn_for_a_batch_that_is_divided_follows_from_the_seed():
    """And not from how much was drawn before it was found not to fit: so a run goes on as if it had never stopped."""
    x, y, losses = torch.randn(8, 3), torch.randn(8, 2), []
    for divided in (False, True):
        torch.manual_seed(1)
        noisy = Noisy(4)
        step = TrainStep(noisy, torch.optim.SGD(noisy.parameters(), lr=0.0), images_per_rank=8, divides=True)
        for _ in range(2 if divided else 1):
            torch.manual_seed(5)
            step.add(x, y, last=True)
            losses.append(step.finish().loss)
    assert losses[0] == losses[1] == losses[2]  # the third step knew beforehand


def test_unless_it_may_it_is_not_divided():
    step = TrainStep(greedy := Greedy(4), torch.optim.SGD(greedy.parameters()), images_per_rank=10)
    with pytest.raises(torch.OutOfMemoryError):
        step.add(torch.ones(6, 3), torch.ones(6, 2), last=True)
