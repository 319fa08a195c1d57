import pytest

from sparse_fcmae import UserError
from sparse_fcmae.model.convnext import GIANTS, SIZES
from sparse_fcmae.tasks.config import FinetuneConfig, PretrainConfig
from sparse_fcmae.tasks.recipes import PRESETS, finetuning_recipe, pretraining_recipe
from sparse_fcmae.training.schedule import Schedule


def config(**options):
    return FinetuneConfig(data="x", **options)


def test_presets_fill_what_is_open():
    assert PRESETS.keys() == {*SIZES, *GIANTS, "probe"}
    for name in SIZES:
        full, _ = finetuning_recipe(config(from_scratch=True), name)
        assert all(getattr(full, key) == value for key, value in PRESETS[name].items())
    base, _ = finetuning_recipe(config(from_scratch=True, epochs=50, layer_decay=0.9), "base")
    assert (base.warmup_epochs, base.layer_decay, base.layer_decay_type, base.base_lr) == (10, 0.9, "group", 6.25e-4)
    assert finetuning_recipe(config(from_scratch=True, preset="tiny"), "atto")[0].mixup == 0.8
    assert finetuning_recipe(config(init="x", freeze_encoder=True), "atto")[0].rand_augment == 0


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(3, 2, 800), (10, 8, 800), (400, 8, 800), (3000, 64, 667), (40_000, 1024, 100), (1_281_167, 4096, 100)],
)
def test_pretraining_suits_the_number_of_images(images, batch, epochs):
    found, notes = pretraining_recipe(PretrainConfig(data="x"), images, 1)
    assert (found.batch_size, found.epochs, found.warmup_epochs) == (batch, epochs, pytest.approx(0.05 * epochs))
    assert found.batch_size <= images
    assert 3e-4 < found.lr <= 2.4e-3
    assert found.base_lr is None
    for option in ("--batch-size", "--epochs", "--warmup-epochs", "--lr"):
        assert any(f"{option} " in note for note in notes), option


@pytest.mark.parametrize(
    ("images", "world", "batch"), [(3000, 1, 64), (3000, 4, 64), (3000, 3, 48), (400, 6, 12), (3, 3, 3)]
)
def test_the_automatic_batch_is_divided_evenly_among_processes(images, world, batch):
    found, _ = pretraining_recipe(PretrainConfig(data="x"), images, world)
    assert found.batch_size == batch
    assert Schedule.of(found, images, world).images_per_rank * world == batch


def test_the_papers_recipe_and_what_is_given_stay():
    paper, _ = pretraining_recipe(PretrainConfig(data="x", recipe="paper"), 1_281_167, 1)
    assert (paper.batch_size, paper.epochs, paper.warmup_epochs, paper.base_lr) == (4096, 800, 40, 1.5e-4)
    assert paper.lr is None
    with pytest.raises(UserError, match="the paper's recipe takes 4096 images a step, more than the 200 in x"):
        pretraining_recipe(PretrainConfig(data="x", recipe="paper"), 200, 1)
    small, _ = pretraining_recipe(PretrainConfig(data="x", recipe="paper", batch_size=64), 200, 1)
    assert small.batch_size == 64
    given = PretrainConfig(data="x", batch_size=10, epochs=3, warmup_epochs=0.5, base_lr=1e-3, save_every=1)
    assert pretraining_recipe(given, 400, 1) == (given, [])


def test_a_rate_that_is_given_replaces_that_of_the_preset():
    found, notes = finetuning_recipe(config(init="x", lr=1e-3, epochs=30), "tiny")
    assert (found.lr, found.base_lr, found.warmup_epochs) == (1e-3, None, 4)
    assert notes[0].startswith("recipe: --batch-size 1024, --epochs 30, --warmup-epochs 4.0, --lr 0.001")


def test_warm_up_that_is_left_open_follows_the_steps_that_are_given():
    found, _ = pretraining_recipe(PretrainConfig(data="x", max_steps=400), 3000, 1)
    assert Schedule.of(found, 3000, 1).warmup_steps == 20  # 5 %
    whole, _ = finetuning_recipe(config(from_scratch=True, batch_size=100), "tiny", images=1000)
    short, _ = finetuning_recipe(config(from_scratch=True, batch_size=100, max_steps=300), "tiny", images=1000)
    assert (whole.warmup_epochs, short.warmup_epochs) == (40, 4)  # of 300 epochs, of 30
