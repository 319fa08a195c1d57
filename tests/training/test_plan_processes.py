"""Plans for several processes, and what is said of those that can't be."""

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.tasks.config import PretrainConfig
from sparse_fcmae.training.schedule import Schedule


def plan(batch, images, world):
    config = PretrainConfig(data="IMAGES", batch_size=batch, epochs=1, warmup_epochs=9.0, lr=1e-3)
    return Schedule.of(config, images, world)


def test_the_batch_that_is_named_can_be_had():
    for world in range(2, 9):
        for batch in range(1, 40):
            if batch % world:
                with pytest.raises(UserError, match=f"{batch} can't be divided evenly among {world}") as error:
                    plan(batch, 1000, world)
                named = int(str(error.value).rsplit(" ", 1)[1])
                assert abs(named - batch) <= max(world // 2, world - batch)
                batch = named
            assert plan(batch, 1000, world).images_per_rank * world == batch


def test_images_for_every_process_are_enough():
    with pytest.raises(UserError, match="2 images are too few for 3 processes: start at most 2"):
        plan(2, 2, 3)
    assert plan(3, 3, 3).images_per_rank == 1
    assert plan(3, 3, 1).steps == 1


def test_no_more_steps_of_warm_up_than_there_are():
    assert (plan(10, 25, 1).steps, plan(10, 25, 1).warmup_steps) == (2, 2)
