from types import SimpleNamespace

import pytest
import torch
from helpers import randomise
from safetensors.torch import load_file

from sparse_fcmae import UserError, create_classifier, finetune, load_encoder, pretrain
from sparse_fcmae.tasks.build import build_classifier, model_name
from sparse_fcmae.tasks.config import FinetuneConfig, PretrainConfig
from sparse_fcmae.weights.convert import export_model


def config(**options):
    return FinetuneConfig(data="x", **options)


def test_loaded_weights_are_not_initialised_again(encoder, tmp_path):
    classes = ("a", "b", "c")
    images = SimpleNamespace(classes=classes)
    model, _, complete_config, notes = build_classifier(config(init=str(encoder)), images, images.classes)
    state = load_file(encoder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert model.head.weight.abs().max() < 1e-3
    assert any("new head for 3 classes" in note for note in notes)
    assert complete_config.image_size == "32"

    trained = randomise(create_classifier("atto", num_classes=3, image_size=32, stem_stride=1))
    for known, names, kept in ((None, classes, True), (classes, classes, True), (("x", "y", "z"), classes, False)):
        export_model(trained, tmp_path / "c", known)
        model, *_ = build_classifier(config(init=str(tmp_path / "c")), None, names)
        assert torch.equal(model.head.weight, trained.head.weight) is kept
        assert torch.equal(model.norm.weight, trained.norm.weight)
    model, *_ = build_classifier(config(init=str(tmp_path / "c")), None, ("a", "b"))
    assert model.head.weight.shape == (2, 320)
    assert torch.equal(model.norm.weight, trained.norm.weight)


def test_a_size_of_ones_own_is_pretrained_gone_on_with_fine_tuned_and_resumed(pictures, tmp_path):
    shared = {"data": pictures, "batch_size": 20, "epochs": 1, "num_workers": 0, "device": "cpu"}
    shape = {"image_size": 32, "stem_stride": 1}
    out, own = tmp_path / "run", {"depths": "1,1,2,1", "dims": "8,12,20,36"}
    pretrain(out=out, **shared, **shape, **own)
    assert load_encoder(out).name == "1-1-2-1:8-12-20-36"
    assert "1-1-2-1:8-12-20-36 on cpu" in (out / "train.log").read_text()
    pretrain(out=out, resume=True, epochs=2)
    pretrain(out=tmp_path / "on", init=out, **shared)
    with pytest.raises(UserError, match=r"is of the size 1-1-2-1:8-12-20-36, not atto: give `depths=1,1,2,1` and `dim"):
        pretrain(out=tmp_path / "other", init=out, **shared, model="atto", depths=None, dims=None)
    finetune(out=tmp_path / "tuned", init=out, val_split=0.5, **shared)
    assert "--drop-path 0.1" in (tmp_path / "tuned" / "train.log").read_text()
    with pytest.raises(UserError, match="`depths` 1,1,2: give four numbers with commas between them, as 3,3,9,3"):
        pretrain(out=tmp_path / "three", **shared, **shape, depths="1,1,2")


def test_depths_alone_change_a_named_size():
    assert model_name(PretrainConfig(model="tiny", depths="3,3,18,3")) == "3-3-18-3:96-192-384-768"
    assert model_name(PretrainConfig(model="tiny", depths="3,3,27,3", dims="128, 256,512,1024")) == "base"
