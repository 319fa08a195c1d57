"""Fixtures that the tests of several tasks share."""

import pytest
from helpers import randomise

from sparse_fcmae import create_encoder
from sparse_fcmae.training import loop
from sparse_fcmae.weights.convert import export_model


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """An encoder's folder, as pretraining exports it."""
    folder = tmp_path_factory.mktemp("encoder") / "exported"
    export_model(randomise(create_encoder("atto", image_size=32, stem_stride=1)), folder)
    return folder


@pytest.fixture
def rehearsed(monkeypatch):
    """Runs rehearse a micro-batch before their first step, as they do on several GPUs."""
    runner, seen = loop._runner, []

    def rehearsing(*arguments):
        seen.append(loop._rehearse(*arguments))
        return runner(*arguments)

    monkeypatch.setattr(loop, "_runner", rehearsing)
    yield
    assert seen
