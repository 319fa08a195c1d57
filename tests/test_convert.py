import json
import sys
from dataclasses import replace

import pytest
import timm
import torch
from helpers import randomise, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ConvNextV2ForImageClassification, ConvNextV2Model

from sparse_fcmae import UserError, convert, create_encoder, create_fcmae, load_encoder
from sparse_fcmae.convert import LAYOUTS, export_encoder
from sparse_fcmae.encoder import SIZES


def exported(folder, name="atto", **options):
    encoder = randomise(create_encoder(name, **options))
    export_encoder(encoder, folder)
    return encoder


CASES = [("atto", {}), ("tiny", {}), ("nano", {"in_chans": 1, "stem_stride": 1})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_timm_loads_it_with_equal_features(tmp_path, name, options):
    encoder = exported(tmp_path / "ours", name, **options)
    assert "loaded by timm" in convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, encoder.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(model.forward_features(images), encoder(images)) < 1e-5
    assert model.pretrained_cfg["mean"] == pytest.approx(LAYOUTS["official"].configs(encoder)["config.json"]["mean"])


def test_timm_has_no_stem_of_stride_2(tmp_path):
    exported(tmp_path / "ours", stem_stride=2)
    with pytest.raises(UserError, match="timm's ConvNeXt V2 has no stem of stride 2"):
        convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    assert not (tmp_path / "timm").exists()


@pytest.mark.parametrize(("name", "options"), [*CASES, ("atto", {"stem_stride": 2})])
def test_huggingface_loads_it_with_equal_features(tmp_path, name, options):
    encoder = exported(tmp_path / "ours", name, **options)
    assert "loaded by transformers" in convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    model, info = ConvNextV2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, encoder.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(model.eval()(images).last_hidden_state, encoder(images)) < 1e-5
    assert AutoImageProcessor.from_pretrained(tmp_path / "hf").size["shortest_edge"] == 224
    classifier = ConvNextV2ForImageClassification.from_pretrained(tmp_path / "hf")
    assert torch.equal(
        classifier.convnextv2.encoder.stages[0].layers[0].dwconv.weight, encoder.stages[0][0].dwconv.weight
    )


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_every_size(name):
    with torch.device("meta"):
        encoder = create_encoder(name)
        real = timm.create_model(f"convnextv2_{name}", num_classes=0).state_dict()
    names = {LAYOUTS["timm"].rename(k): LAYOUTS["timm"].shape(name, k, v) for k, v in encoder.state_dict().items()}
    assert names | {"head.norm.weight": None, "head.norm.bias": None} == {
        k: None if k.startswith("head.") else tuple(v.shape) for k, v in real.items()
    }


def test_official_is_what_load_encoder_reads(tmp_path):
    encoder = exported(tmp_path / "ours", image_size=(64, 96), grn_scope="batch")
    convert(tmp_path / "ours", tmp_path / "again", to="official")
    again = load_encoder(tmp_path / "again", backend="torch")
    assert (again.image_size, again.grn_scope, again.backend, again.training) == ((64, 96), "batch", "torch", False)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(encoder.state_dict())


def test_a_whole_models_file_and_a_pooled_encoder(tmp_path):
    model = randomise(create_fcmae("atto", image_size=64, grn_scope="batch"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    report = convert(tmp_path / "model.safetensors", tmp_path / "timm", to="timm")
    assert "dropped 15 tensors of the decoder" in report
    state = load_encoder(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.encoder.state_dict().items())


def test_a_wrong_mapping_is_caught_and_nothing_written(tmp_path, monkeypatch):
    exported(tmp_path / "ours")
    names = LAYOUTS["timm"].names
    swapped = [(r"\.grn\.gamma$", ".mlp.grn.bias"), (r"\.grn\.beta$", ".mlp.grn.weight"), *names]
    monkeypatch.setitem(LAYOUTS, "timm", replace(LAYOUTS["timm"], names=swapped))
    with pytest.raises(UserError, match="features differ"):
        convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_reads_back_itself_where_the_library_is_missing(tmp_path, monkeypatch):
    exported(tmp_path / "ours")
    for library, to in (("timm", "timm"), ("transformers", "huggingface")):
        monkeypatch.setitem(sys.modules, library, None)
        report = convert(tmp_path / "ours", tmp_path / to, to=to)
        assert f"read back by sparse-fcmae, as {library} can't be imported" in report


def test_mistakes_leave_the_destination_untouched(tmp_path):
    encoder = exported(tmp_path / "ours")
    state = encoder.state_dict()
    weights = tmp_path / "ours" / "model.safetensors"

    def fails(source, message, destination="new", **options):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / source, tmp_path / destination, **{"to": "timm", **options})
        assert not (tmp_path / "new").exists()

    def file(name, change):
        changed = dict(state)
        change(changed)
        save_file(changed, tmp_path / name)
        return name

    fails("missing", "no such file or folder")
    (tmp_path / "empty").mkdir()
    fails("empty", "holds no model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    fails("cut.safetensors", "can't be read as safetensors")
    fails(file("a.safetensors", lambda s: s.pop("stages.0.0.norm.bias")), "stages.0.0.norm.bias is missing")
    fails(file("b.safetensors", lambda s: s.update(extra=torch.zeros(1))), "extra is unknown")
    fails(file("c.safetensors", lambda s: s.update({"stages.0.0.norm.bias": torch.zeros(3)})), r"is \[3\], not \[40\]")
    fails(file("d.safetensors", lambda s: s.pop("downsample_layers.0.0.weight")), "not an encoder of ours")
    fails("ours", "unknown layout", to="keras")
    fails("ours", "not empty", destination="ours")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    fails("ours", "holds more than a conversion", destination="other", overwrite=True)
    assert (tmp_path / "other" / "precious.txt").exists()
    fails("ours", "is a file", destination="ours/config.json")


def test_overwrite_replaces_an_earlier_conversion(tmp_path):
    exported(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", to="huggingface")
    convert(tmp_path / "ours", tmp_path / "out", to="timm", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "convnextv2_atto"
