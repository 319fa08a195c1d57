from types import SimpleNamespace

import torch
from helpers import randomise
from safetensors.torch import load_file

from sparse_fcmae import create_classifier
from sparse_fcmae.tasks.build import build_classifier
from sparse_fcmae.tasks.config import FinetuneConfig
from sparse_fcmae.weights.convert import export_model


def config(**options):
    return FinetuneConfig(data="x", **options)


def test_loaded_weights_are_not_initialised_again(encoder, tmp_path):
    classes = ("a", "b", "c")
    images = SimpleNamespace(classes=classes)
    model, _, complete_config, notes = build_classifier(config(init=str(encoder)), images)
    state = load_file(encoder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert model.head.weight.abs().max() < 1e-3
    assert any("new head for 3 classes" in note for note in notes)
    assert complete_config.image_size == "32"

    trained = randomise(create_classifier("atto", num_classes=3, image_size=32, stem_stride=1))
    for known, names, kept in ((None, classes, True), (classes, classes, True), (("x", "y", "z"), classes, False)):
        export_model(trained, tmp_path / "c", known)
        model, *_ = build_classifier(config(init=str(tmp_path / "c")), SimpleNamespace(classes=names))
        assert torch.equal(model.head.weight, trained.head.weight) is kept
        assert torch.equal(model.norm.weight, trained.norm.weight)
    model, *_ = build_classifier(config(init=str(tmp_path / "c")), SimpleNamespace(classes=("a", "b")))
    assert model.head.weight.shape == (2, 320)
    assert torch.equal(model.norm.weight, trained.norm.weight)
