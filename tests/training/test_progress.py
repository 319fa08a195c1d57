import math
from types import SimpleNamespace

import pytest
import torch

from sparse_fcmae import UserError
from sparse_fcmae.data.batches import Batch
from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.runtime.distributed import Ranks
from sparse_fcmae.training.progress import Diverged, Progress
from sparse_fcmae.training.step import StepResult

CPU = Ranks(0, 1, torch.device("cpu"))


def progress(bad=None, ranks=CPU, allowed=0.1):
    said, recorded = [], []
    log = SimpleNamespace(say=said.append, steps=lambda *arguments: recorded.append(arguments[:7]))
    config = SimpleNamespace(batch_size=4, max_bad_images=allowed, max_nonfinite=3, lr_range=None, out="runs/x")
    made = Progress(
        config, SimpleNamespace(steps_per_epoch=5, peak_lr=0.2), range(20), log, ranks, {} if bad is None else bad, 0
    )
    made.said, made.recorded = said, recorded
    return made


def result(loss, norm=0.5):
    return StepResult(loss, torch.tensor(norm))


def batch(images, *bad):
    return Batch(torch.zeros(images, 2, 2, 3), torch.arange(images), [BadImage(name, "cut") for name in bad])


def test_losses_are_recorded_together_and_once():
    steps = progress()
    for loss in (1.0, 0.5):
        steps.take(batch(4), 4)
        steps.step_done(result(torch.tensor(loss)), lr=loss / 10)
    steps.flush(2, 0.25)
    steps.step_done(result(torch.tensor(0.25)), lr=0.01)
    steps.flush(3, 0.25)
    assert steps.recorded == [
        (2, 5, [1.0, 0.5], [0.5, 0.5], [0.1, 0.05], 8, 0.25),
        (3, 5, [0.25], [0.5], [0.01], 4, 0.25),
    ]


def test_an_unreadable_image_is_named_once_in_all_of_a_run():
    bad = {"old.png": "cut"}
    steps = progress(bad, allowed=0.15)
    steps.take(batch(4, "new.png", "old.png"), 4)
    steps.take(batch(4, "new.png"), 4)
    steps.step_done(result(torch.tensor(1.0)), 0.1)
    steps.flush(1, 0.25)
    assert steps.said == ["unreadable, replaced by another image: new.png: cut"]
    assert bad == {"old.png": "cut", "new.png": "cut"}  # which checkpoints hold
    steps.take(batch(4, "third.png", "fourth.png"), 4)
    steps.step_done(result(torch.tensor(1.0)), 0.1)
    with pytest.raises(UserError, match=r"4 of 20 images are unreadable, such as old.png: raise `max_bad_images`"):
        steps.flush(2, 0.25)


def test_what_other_ranks_could_not_read_counts_too():
    ranks = SimpleNamespace(
        gather=lambda value: [value, [BadImage("there.png", "cut")]], mean=lambda values: values / 2
    )
    steps = progress(ranks=ranks)
    steps.step_done(result(torch.tensor(1.0)), 0.1)
    steps.flush(1, 0.25)
    assert steps.said == ["unreadable, replaced by another image: there.png: cut"]
    assert steps.recorded[0][2] == [0.5]


def test_a_batch_without_enough_images_ends_the_run():
    with pytest.raises(UserError, match=r"no readable image found in many tries: b.png: cut; check `data`"):
        progress().take(batch(3, "a.png", "b.png"), 4)


def test_steps_that_are_not_finite_are_counted_in_a_row():
    steps = progress()
    values = [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 1.0), (math.inf, math.nan), (1.0, math.nan)]
    for loss, norm in values:
        steps.step_done(result(torch.tensor(loss), norm), 0.1)
    steps.flush(6, 0.0)
    assert steps.said == ["skipped, as loss or gradient were not finite: step 2, 3, 5, 6"]
    assert steps.done == 6
    steps.step_done(result(torch.tensor(math.nan)), 0.1)
    with pytest.raises(Diverged, match="were not finite in 3 steps in a row, up to step 7: lower `lr` or `base_lr`"):
        steps.flush(7, 0.0)


@pytest.mark.parametrize(
    ("losses", "said"), [([1.0] * 10 + [2.0] * 150 + [0.9] * 100, 1), ([1.0] * 10 + [0.9] * 400, 0)]
)
def test_a_loss_that_has_risen_above_its_start_is_said_once(losses, said):
    steps = progress()
    for number, loss in enumerate([*losses, *losses[20:]], 1):
        steps.step_done(result(torch.tensor(loss)), 0.1)
        if number % 7 == 0:
            steps.flush(number, 0.0)
    assert len(steps.said) == said
    assert all("and was 1.0000 at the start: if it stays there, try --lr 0.05" in line for line in steps.said)
