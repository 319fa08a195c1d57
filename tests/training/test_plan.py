import pytest

from sparse_fcmae import UserError
from sparse_fcmae.tasks.config import PretrainConfig
from sparse_fcmae.training.schedule import Schedule


def plan(images=103, world=1, **options):
    open_ends = {"data": "IMAGES", "batch_size": 20, "epochs": 4, "warmup_epochs": 0.5, "lr": 1e-3}
    return Schedule.of(PretrainConfig(**{**open_ends, **options}), images, world)


def test_an_epochs_incomplete_batch_is_left_out():
    schedule = plan()
    assert (schedule.steps_per_epoch, schedule.steps, schedule.warmup_steps) == (5, 20, 2)
    assert (schedule.batch_size, schedule.images_per_rank, schedule.save_every) == (20, 20, 5)
    assert schedule.epoch(10) == 2.0
    assert str(schedule) == "20 a step, 5 steps an epoch, 20 in all, 2 of warm-up, peak lr 0.001"


def test_micro_batches_cover_a_ranks_images_once():
    schedule = plan(micro_batch_size=3, world=2)
    assert schedule.images_per_rank == 10
    assert schedule.micro_batches() == [(0, 3), (3, 3), (6, 3), (9, 1)]


def test_the_rate_is_given_or_follows_from_the_batch():
    assert plan().peak_lr == 1e-3
    assert plan(lr=None, base_lr=1.5e-4, batch_size=100).peak_lr == pytest.approx(1.5e-4 * 100 / 256)
    assert plan().lr(0) == pytest.approx(0.5e-3)


def test_when_models_are_evaluated_and_saved():
    schedule = plan(eval_every=3)
    assert [step for step in range(1, 21) if schedule.evaluates_after(step)] == [15, 20]
    assert plan(images=100_000).save_every == 500
    assert plan(save_every=7).save_every == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 19}, "`batch_size` 20 is more than the 19 images in IMAGES: choose 19 or less"),
        ({"world": 3}, "`batch_size` 20 can't be divided evenly among 3 processes"),
    ],
)
def test_a_batch_that_does_not_suit(options, message):
    with pytest.raises(UserError, match=message):
        plan(**options)
