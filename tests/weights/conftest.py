"""Models written into folders, for the tests of all that reads and converts them."""

import pytest
from helpers import randomise

from sparse_fcmae import create_classifier, create_encoder
from sparse_fcmae.weights.convert import export_model

CLASSES = ("cat", "dog", "newt")


@pytest.fixture
def export_encoder(tmp_path):
    """A function that writes an encoder into tmp_path / folder and returns it. All its weights are random."""

    def export(name="atto", folder="ours", **options):
        encoder = randomise(create_encoder(name, **options))
        export_model(encoder, tmp_path / folder)
        return encoder

    return export


@pytest.fixture
def export_classifier(tmp_path):
    """A function that writes a classifier of CLASSES into tmp_path / folder and returns it."""

    def export(name="atto", folder="ours", form=None, **options):
        model = randomise(create_classifier(name, num_classes=len(CLASSES), **options)).eval()
        export_model(model, tmp_path / folder, CLASSES, form)
        return model

    return export
