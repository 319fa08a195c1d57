import numpy as np
import pytest

from sparse_fcmae import UserError
from sparse_fcmae.tasks.config import PretrainConfig
from sparse_fcmae.training.schedule import Schedule, cosine_lr


def test_warm_up_and_cosine():
    rates = [cosine_lr(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.001
    assert cosine_lr(0, 4, 4, 1.0) == 0.25
    assert cosine_lr(0, 4, 0, 1.0) == 1.0


def test_cosine_ends_at_the_least_rate():
    assert cosine_lr(9, 10, 5, 1.0, 0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 0.8)))
    assert cosine_lr(10, 10, 5, 1.0, 0.1) == pytest.approx(0.1)
    assert cosine_lr(2, 10, 5, 1.0, 0.1) == pytest.approx(0.6)
    assert cosine_lr(9, 10, 0, 1e-7, 1e-6) == pytest.approx(1e-7)


def plan(images=103, world=1, **options):
    open_ends = {"data": "IMAGES", "batch_size": 20, "epochs": 4, "warmup_epochs": 0.5, "lr": 1e-3}
    return Schedule.of(PretrainConfig(**{**open_ends, **options}), images, world)


def test_an_epochs_incomplete_batch_is_left_out():
    schedule = plan()
    assert (schedule.steps_per_epoch, schedule.steps, schedule.warmup_steps) == (5, 20, 2)
    assert (schedule.batch_size, schedule.images_per_rank, schedule.save_every) == (20, 20, 5)
    assert schedule.epoch(10) == 2.0
    assert str(schedule) == "20 a step, 5 steps an epoch, 20 in all, 2 of warm-up, peak lr 0.001"


def test_steps_outright_take_the_place_of_the_epochs_steps():
    for steps, warmup in ((10, 2), (40, 2), (1, 1)):  # half an epoch, as asked for
        schedule = plan(max_steps=steps)
        assert (schedule.steps, schedule.steps_per_epoch, schedule.warmup_steps) == (steps, 5, warmup)
    assert plan(max_steps=20) == plan()


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


def plan_of(batch, images, world):
    config = PretrainConfig(data="IMAGES", batch_size=batch, epochs=1, warmup_epochs=9.0, lr=1e-3)
    return Schedule.of(config, images, world)


def test_the_batch_that_is_named_can_be_had():
    for world in range(2, 9):
        for batch in range(1, 40):
            if batch % world:
                with pytest.raises(UserError, match=f"{batch} can't be divided evenly among {world}") as error:
                    plan_of(batch, 1000, world)
                named = int(str(error.value).rsplit(" ", 1)[1])
                assert abs(named - batch) <= max(world // 2, world - batch)
                batch = named
            assert plan_of(batch, 1000, world).images_per_rank * world == batch


def test_the_batch_that_is_named_has_no_more_images_than_there_are():
    with pytest.raises(UserError, match=r"5 can't be divided evenly among 3 processes: choose 3$"):
        plan_of(5, 5, 3)
    assert plan_of(3, 5, 3).images_per_rank == 1


def test_images_for_every_process_are_enough():
    with pytest.raises(UserError, match="2 images are too few for 3 processes: start at most 2"):
        plan_of(2, 2, 3)
    assert plan_of(3, 3, 3).images_per_rank == 1
    assert plan_of(3, 3, 1).steps == 1


def test_no_more_steps_of_warm_up_than_there_are():
    assert (plan_of(10, 25, 1).steps, plan_of(10, 25, 1).warmup_steps) == (2, 2)
