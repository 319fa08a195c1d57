"""The loss on held-out images: by hand, and whatever the batches and the number of ranks."""

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_fcmae import UserError, create_fcmae
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders.image import PHOTOGRAPHS, Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.held_out import HeldOutLoss
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.runtime.streams import Stream, torch_seed

SIZE = (32, 32)


def view(batch_size=3, native=False, form=None, reading=PHOTOGRAPHS):
    shared = {"crop_fraction": 1.0, "device": torch.device("cpu"), "batch_size": batch_size, "native": native}
    return EvaluationView(size=SIZE, form=form or ImageFormat.imagenet(), reading=reading, **shared)


@pytest.fixture
def images(tmp_path):
    """Seven images, of which one is broken."""
    rng = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("no image")
    return open_images(tmp_path, None, SourceConfig())


@pytest.fixture
def model():
    return create_fcmae("1-1-1-1:8-8-8-8", image_size=SIZE, stem_stride=1, decoder_dim=16)


def by_hand(model, images, seed):
    """The mean of the losses of one image after the other."""
    losses = []
    for number in (0, 1, 2, 4, 5, 6):
        with images.open(number) as file:
            pixels = CentreView(SIZE, PHOTOGRAPHS)(file)[None]
        generator = torch.Generator().manual_seed(torch_seed(seed, Stream.HELD_OUT, number, 0))
        mask = model.draw_mask(1, SIZE, generator=generator)
        losses.append(model(ImageFormat.imagenet().normalise(pixels), mask).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("world", [1, 2, 3, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_it_is_the_mean_of_the_images_losses(images, model, on_ranks, world, batch_size):
    found = on_ranks(world, lambda ranks: HeldOutLoss(images, view(batch_size), ranks, seed=5).of(model))
    for loss, bad in found:
        assert loss == pytest.approx(by_hand(model, images, 5), rel=1e-6)
        assert [name for name, _ in bad] == ["3.png"]


def test_masks_follow_from_the_seed(images, model, on_ranks):
    ((one, _),) = on_ranks(1, lambda ranks: HeldOutLoss(images, view(), ranks, seed=5).of(model))
    ((again, _),) = on_ranks(1, lambda ranks: HeldOutLoss(images, view(), ranks, seed=5).of(model))
    ((other, _),) = on_ranks(1, lambda ranks: HeldOutLoss(images, view(), ranks, seed=6).of(model))
    assert one == again != other


def test_native_windows_and_missing_values(tmp_path, model, on_ranks):
    """A window with values that are not recorded counts those alone that are."""
    values = np.random.default_rng(0).normal(size=(64, 32, 3)).astype(np.float32)
    np.save(tmp_path / "whole.npy", values)
    values[:16] = np.nan
    np.save(tmp_path / "part.npy", values)
    form = ImageFormat("float32", (0.0,) * 3, (1.0,) * 3, native=True)
    reading = Reading(in_chans=3, dtype="float32")
    source = open_images(tmp_path, None, SourceConfig())
    ((loss, bad),) = on_ranks(1, lambda ranks: HeldOutLoss(source, view(4, True, form, reading), ranks, 0).of(model))
    assert bad == []
    losses = []
    for number, name in enumerate(("part.npy", "whole.npy")):
        for window in range(2):
            pixels = torch.from_numpy(np.load(tmp_path / name)[32 * window : 32 * window + 32])[None]
            generator = torch.Generator().manual_seed(torch_seed(0, Stream.HELD_OUT, number, window))
            mask = model.draw_mask(1, SIZE, generator=generator)
            statistics = form.statistics(pixels.device)
            losses.append(model(pixels.permute(0, 3, 1, 2), mask, statistics=statistics).loss.item())
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_no_readable_image_is_an_error(tmp_path, model, on_ranks):
    (tmp_path / "x.png").write_text("no image")
    source = open_images(tmp_path, None, SourceConfig())
    with pytest.raises(UserError, match=r"no image of .* is readable: x.png: "):
        on_ranks(1, lambda ranks: HeldOutLoss(source, view(), ranks, 0).of(model))
