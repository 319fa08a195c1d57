"""Checks of features while an encoder is trained: the numbers of `analyze`, in a small part of the time."""

import pytest
from helpers import randomise

from sparse_fcmae import create_encoder
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.analyze import analyze
from sparse_fcmae.evaluation.feature_check import COST, SHARE, FeatureCheck, images_for, steps_between_checks
from sparse_fcmae.weights.convert import export_model


def test_the_numbers_are_those_of_analyze(pictures, tmp_path):
    encoder = randomise(create_encoder("atto", stem_stride=1))
    form = ImageFormat("uint8", (120.0, 110.0, 100.0), (60.0, 50.0, 40.0))
    export_model(encoder, tmp_path / "weights", form=form)
    options = {"image_size": 32, "crop_fraction": 1.0, "dtype": "fp32", "device": "cpu"}
    (expected,) = analyze(data=str(pictures), init=str(tmp_path / "weights"), out=str(tmp_path / "out"), **options)
    source = ImageFolder(str(pictures))
    found = FeatureCheck(source, CentreView((32, 32), Reading(3)), form, 1, bf16=False).of(encoder)
    assert found["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-4)
    distances = {f"distance_{block['name']}": block["distance"] for block in expected["blocks"]}
    assert {k: v for k, v in found.items() if k.startswith("distance_")} == pytest.approx(distances, abs=1e-4)
    assert found["channel_distance"] == pytest.approx(min(distances.values()), abs=1e-4)


@pytest.mark.parametrize(
    ("images", "batch", "steps", "eval_steps", "expected"),
    [
        (128, 128, 1248, 780, 780),  # two evaluations, the last step's among them
        (128, 128, 6240, 780, 780),
        (128, 4096, 250_000, 3120, 3120),
        (128, 64, 1000, 40, 520),  # of 25 evaluations two are affordable
        (128, 64, 700, 40, None),  # not even three checks
        (31, 64, 10**6, 10, None),  # too few images
    ],
)
def test_checks_are_as_many_as_the_run_can_afford(images, batch, steps, eval_steps, expected):
    every = steps_between_checks(images, batch, steps, eval_steps)
    assert every == expected
    if every:
        assert every % eval_steps == 0
        checks = 1 + -(-steps // every)
        assert checks * images * COST <= SHARE * steps * batch


def test_large_images_are_kept_in_little_memory(pictures):
    source = ImageFolder(str(pictures))
    assert images_for(source, CentreView((32, 32), Reading(3))) == 40
    assert images_for(source, CentreView((1024, 1024), Reading(3))) == 21
