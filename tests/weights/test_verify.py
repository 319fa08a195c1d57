import json
import re
import shutil

import pytest
import timm as timm_library
import torch
from helpers import randomise, relative_error
from timm.models import save_for_hf
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, ConvNextV2Model

from sparse_fcmae import UserError, convert, create_classifier, create_encoder, load_classifier, load_encoder
from sparse_fcmae.backends.masked import MaskedPatches
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.convert import write
from sparse_fcmae.weights.read import read_weights
from sparse_fcmae.weights.verify import _run, verify
from sparse_fcmae.weights.weights import Weights


@pytest.fixture(scope="module")
def weights():
    return Weights.of(randomise(create_classifier("atto", num_classes=3, image_size=32)))


@pytest.mark.parametrize(
    ("to", "key"),
    [
        ("official", "stages.2.3.grn.beta"),
        ("mmpretrain", "downsample_layers.0.0.weight"),
        ("huggingface", "head.bias"),
        ("timm", "stages.0.1.dwconv.weight"),
    ],
)
def test_a_conversion_with_one_wrong_tensor_is_refused(tmp_path, monkeypatch, weights, to, key):
    target = TARGETS[to]
    right = target.from_official

    def wrong(state):
        return right({**state, key: state[key] + 1e-2 * torch.randn_like(state[key])})

    monkeypatch.setattr(target, "from_official", wrong)
    write(weights, target, tmp_path)
    with pytest.raises(UserError, match="differ"):
        verify(weights, target, tmp_path)


def test_what_is_right_is_said_to_be(tmp_path):
    weights, target = Weights.of(randomise(create_encoder("atto", image_size=32))), TARGETS["official"]
    write(weights, target, tmp_path)
    lines = verify(weights, target, tmp_path)
    assert lines
    assert all("verified" in line for line in lines)


@pytest.fixture
def timm(monkeypatch):
    """timm's target with a library that computes what this package does; `change` makes it compute something else."""
    target = TARGETS["timm"]

    def let_it(change=lambda outputs: outputs):
        monkeypatch.setattr(target, "run", lambda path, weights, images: change(_run(weights, images)))
        return target

    return let_it


def changed(name, by):
    return lambda outputs: outputs | {name: outputs[name] * (1 + by)}


def test_a_library_that_computes_the_same_is_named(tmp_path, weights, timm):
    target = timm()
    write(weights, target, tmp_path)
    lines = verify(weights, target, tmp_path)
    assert [line.split(", equal within")[0] for line in lines] == [
        "verified: result read back by sparse-fcmae",
        "verified: result run by timm",
    ]


@pytest.mark.parametrize("name", ["features", "logits"])
def test_a_library_that_computes_something_else_is_believed(tmp_path, weights, timm, name):
    target = timm(changed(name, 2e-5))
    write(weights, target, tmp_path)
    with pytest.raises(UserError, match=r"not written: source and result differ by 2.0e-05 \(result run by"):
        verify(weights, target, tmp_path)
    assert verify(weights, timm(changed(name, 5e-6)), tmp_path)  # which is rounding


def test_a_library_that_does_not_take_the_result_refuses_it(tmp_path, weights, timm):
    def fail(outputs):
        raise KeyError("head.fc.weight\nis unknown")

    write(weights, timm(), tmp_path)
    with pytest.raises(UserError, match=r"not written: timm does not take the result: 'head.fc.weight") as error:
        verify(weights, timm(fail), tmp_path)
    assert "\n" not in str(error.value)


def test_a_library_that_is_missing_is_said_to_be(tmp_path, weights, timm):
    def missing(outputs):
        raise UserError("timm is not installed: pip install timm")

    write(weights, timm(), tmp_path)
    lines = verify(weights, timm(missing), tmp_path)
    assert lines[-1] == "result not run by the library: timm is not installed: pip install timm"


def test_a_source_is_run_as_it_was_read(tmp_path, weights, timm):
    """The tensors of the source under its own names, beside configs of its own."""
    write(weights, timm(), tmp_path)
    source, seen = read_weights(tmp_path), []

    def look(path, weights, images):
        seen.append(sorted(p.name for p in path.iterdir()))
        assert read_weights(path).original.keys() == source.original.keys()
        return _run(weights, images)

    official = TARGETS["official"]
    write(source, official, tmp_path)
    target = timm()
    target.run = look
    assert "source run by timm" in verify(source, official, tmp_path)[0]
    assert seen == [["config.json", "model.safetensors"]]
    target.run = lambda path, weights, images: changed("logits", 1e-3)(_run(weights, images))
    with pytest.raises(
        UserError, match=r"source and result differ by 1.0e-03 \(source run by timm with its own config\)"
    ):
        verify(source, official, tmp_path)


def test_a_mistake_that_shows_on_masked_images_alone_is_found(tmp_path, monkeypatch):
    weights, target = Weights.of(randomise(create_encoder("atto"))), TARGETS["fcmae"]
    write(weights, target, tmp_path)
    lines = verify(weights, target, tmp_path)
    assert any("half of the patches masked" in line for line in lines)
    monkeypatch.setattr(MaskedPatches, "dwconv", lambda self, x, conv: conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    with pytest.raises(UserError, match=r"source and result differ by .* half of the patches masked\)"):
        verify(weights, target, tmp_path)


def test_results_that_are_not_finite_are_not_called_equal(tmp_path):
    encoder = randomise(create_encoder("atto", image_size=32))
    with torch.no_grad():
        encoder.stages[3][1].pwconv2.weight.fill_(1e38)
        encoder.stages[3][1].pwconv2.bias.fill_(3e38)
    weights, target = Weights.of(encoder), TARGETS["official"]
    write(weights, target, tmp_path)
    with pytest.raises(UserError, match=r"not written: the features are not finite \(result read back"):
        verify(weights, target, tmp_path)


def hugging_face(folder, classes=0, **changes):
    """A folder that transformers itself writes, with settings of its own."""
    torch.manual_seed(0)
    config = ConvNextV2Config(
        num_channels=3, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1], num_labels=classes or 2, **changes
    )
    model = randomise((ConvNextV2ForImageClassification if classes else ConvNextV2Model)(config))
    model.save_pretrained(folder)
    return model.eval()


def timms(folder, classes=3, **changes):
    """A folder as timm's `save_for_hf` writes it, with arguments of its own."""
    torch.manual_seed(0)
    arguments = {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 24]} | changes
    model = randomise(timm_library.create_model("convnextv2_base", num_classes=classes, **arguments)).eval()
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


@pytest.mark.parametrize("classes", [0, 5])
def test_a_folder_of_transformers_is_run_with_its_own_config(tmp_path, classes):
    model = hugging_face(tmp_path / "theirs", classes)
    text = convert(tmp_path / "theirs", tmp_path / "ours", to="official")
    assert "verified: source run by transformers with its own config, equal within" in text
    change = re.search(r"the final norm adds 1e-06 to the variance here, and 1e-12 there: .* differ by (\S+)", text)
    assert 1e-7 < float(change[1]) < 1e-4
    images = torch.randn(2, 3, 64, 96)
    if classes:
        assert relative_error(load_classifier(tmp_path / "ours")(images), model(images).logits) < 1e-4
    else:
        assert relative_error(load_encoder(tmp_path / "ours")(images), model(images).last_hidden_state) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_of_transformers_in_half_precision_is_run_in_float32(tmp_path, dtype):
    hugging_face(tmp_path / "theirs", 5).to(dtype).save_pretrained(tmp_path / "theirs")
    text = convert(tmp_path / "theirs", tmp_path / "ours", to="official")
    assert "verified: source run by transformers with its own config, equal within" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu', not 'gelu'"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', not 'gelu'"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps 0.1, not 1e-06 or less"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps 0.0, not 1e-06 or less"),
    ],
)
def test_a_model_of_transformers_that_is_another_function_is_refused(tmp_path, changes, message):
    hugging_face(tmp_path / "theirs", 5, **changes)
    for read in (load_encoder, load_classifier, lambda path: convert(path, tmp_path / "ours", to="official")):
        with pytest.raises(UserError) as error:
            read(tmp_path / "theirs")
        assert str(error.value).endswith(f"describes a model that this package does not have: {message}")
    assert not (tmp_path / "ours").exists()


def test_a_folder_of_timm_is_run_with_its_own_config(tmp_path):
    model = timms(tmp_path / "theirs", act_layer="gelu", norm_eps=1e-6)
    text = convert(tmp_path / "theirs", tmp_path / "ours", to="official")
    assert "verified: source run by timm with its own config, equal within" in text
    images = torch.randn(2, 3, 64, 96)
    assert relative_error(load_classifier(tmp_path / "ours")(images), model(images)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_layer": "relu"}, "act_layer 'relu', not 'gelu' or None"),
        ({"act_layer": "gelu_tanh"}, "act_layer 'gelu_tanh', not 'gelu' or None"),
        ({"output_stride": 16}, "output_stride 16, not 32"),
        ({"norm_eps": 1e-3}, "norm_eps 0.001, not 1e-06 or None"),
        ({"global_pool": "max"}, "global_pool 'max', not 'avg'"),
    ],
)
def test_a_model_of_timm_that_is_another_function_is_refused(tmp_path, changes, message):
    timms(tmp_path / "theirs", **changes)
    with pytest.raises(UserError, match=f"describes a model that this package does not have: {message}"):
        convert(tmp_path / "theirs", tmp_path / "ours", to="official")
    assert not (tmp_path / "ours").exists()


def test_settings_of_timm_that_are_not_known_are_refused(tmp_path):
    timms(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_args": {"new_setting": 3}}))
    with pytest.raises(UserError, match="new_setting 3, which is not known here"):
        load_encoder(tmp_path / "theirs")
    file.write_text(json.dumps(config | {"architecture": "convnext_tiny"}))
    with pytest.raises(UserError, match="architecture 'convnext_tiny', not one of convnextv2"):
        load_encoder(tmp_path / "theirs")


def test_a_file_alone_is_run_with_a_config_made_of_its_shapes(tmp_path):
    timms(tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs" / "model.safetensors", tmp_path / "alone.safetensors")
    text = convert(tmp_path / "alone.safetensors", tmp_path / "ours", to="official")
    assert "verified: source run by timm with a config made of its shapes, equal within" in text


def test_a_source_that_computes_other_shapes_is_refused(tmp_path, weights, timm):
    write(weights, timm(), tmp_path)
    target = timm()
    target.run = lambda path, weights, images: {name: value[:1] for name, value in _run(weights, images).items()}
    with pytest.raises(UserError, match=r"not written: the features are \[1, .*\], not \[2, .*\] \(source run by timm"):
        verify(read_weights(tmp_path), TARGETS["official"], tmp_path)


@pytest.mark.parametrize(
    "images",
    [
        {"mean": [float("nan"), 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.0, 0.2]},
        {"mean": [0.5, 0.5, 0.5], "std": [0.2, -0.1, 0.2]},
        {"mean": [0.5, 0.5, 0.5], "std": [0.2, float("inf"), 0.2]},
        {"mean": [0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        {"input_size": [3, 0, -32]},
        {"input_size": [3, 10**9, 10**9]},
    ],
)
def test_values_of_a_config_that_can_not_be_are_named(tmp_path, images):
    timms(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | images}))
    with pytest.raises(UserError, match=r"config.json can't be understood \(ValueError: ") as error:
        load_encoder(tmp_path / "theirs")
    assert "\n" not in str(error.value)


def test_a_config_of_other_channels_than_the_weights_is_refused(tmp_path):
    hugging_face(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_channels": 4}))
    with pytest.raises(UserError, match=r"its config.json says num_channels 4, its tensors have 3"):
        load_encoder(tmp_path / "theirs")
