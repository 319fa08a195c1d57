"""What is made of a checkpoint: its layout and its size are recognised, mistakes are named, nothing is executed."""

import json

import pytest
import torch
from helpers import randomise, relative_error
from safetensors.torch import load_file, save_file

from sparse_fcmae import UserError, convert, create_fcmae, load_classifier, load_encoder, load_fcmae, pretrain
from sparse_fcmae.weights.adapters import ADAPTERS
from sparse_fcmae.weights.huggingface import HuggingFace
from sparse_fcmae.weights.mmpretrain import MMPretrain
from sparse_fcmae.weights.opening import FILES
from sparse_fcmae.weights.read import read_weights
from sparse_fcmae.weights.timm import Timm


def test_files_are_found_by_preference():
    assert FILES == ["model.safetensors", "model.pt", "model.pth", "pytorch_model.bin"]
    assert {adapter.weights_file for adapter in ADAPTERS} < set(FILES)


def test_other_peoples_variants_are_recognised(tmp_path, export_classifier):
    state = export_classifier().state_dict()
    hf = {k.removeprefix("convnextv2."): v for k, v in HuggingFace().from_official(state).items()}
    mm = {k.removeprefix("backbone."): v for k, v in MMPretrain().from_official(state).items()}
    in_timm = Timm().from_official(state).items()
    variants = {
        "bare.pt": {k: v for k, v in hf.items() if not k.startswith("classifier")},  # ConvNextV2Model's own names
        "backbone.pth": {"state_dict": mm},
        "half.pt": {"model": {f"module._orig_mod.{k}": v.half() for k, v in state.items()}, "model_ema": {"x": 1}},
        "linear.bin": {k: v.flatten(1) if "mlp.fc" in k and v.dim() == 4 else v for k, v in in_timm},
        "plain.pt": {"model": {f"encoder.{k}": v for k, v in state.items() if not k.startswith(("norm", "head"))}},
    }
    for name, content in variants.items():
        torch.save(content, tmp_path / name)
        weights = read_weights(tmp_path / name)
        assert weights.architecture["name"] == "atto"
        tolerance = 1e-3 if name == "half.pt" else 0
        assert all(relative_error(v, state[k]) <= tolerance for k, v in weights.state.items())
    assert "norm.weight" in read_weights(tmp_path / "bare.pt").state
    assert read_weights(tmp_path / "plain.pt").sparse
    assert any("model_ema" in note for note in read_weights(tmp_path / "half.pt").notes)


def test_official_is_what_load_encoder_reads(tmp_path, export_encoder):
    encoder = export_encoder(image_size=(64, 96), grn_scope="batch")
    convert(tmp_path / "ours", tmp_path / "again", to="official")
    again = load_encoder(tmp_path / "again", backend="torch")
    assert (again.image_size, again.grn_scope, again.backend, again.training) == ((64, 96), "batch", "torch", False)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in encoder.state_dict().items())
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(encoder.state_dict())
    with pytest.raises(UserError, match="no classification head"):
        load_classifier(tmp_path / "again")


def test_fcmae_layout_keeps_the_decoder_and_comes_back(tmp_path):
    model = randomise(create_fcmae("atto", image_size=64))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "official.pt", to="fcmae")
    found = torch.load(tmp_path / "official.pt", weights_only=True)["model"]
    encoder = {k for k in model.state_dict() if k.startswith("encoder.")}
    assert found.keys() >= model.state_dict().keys() - encoder
    assert sum(key.endswith(".kernel") for key in found) == 12 + 3
    weights = read_weights(tmp_path / "official.pt")
    assert (weights.sparse, weights.has_decoder) == (True, True)
    ours = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(weights.state[key], value) for key, value in ours.items())


def test_a_runs_folder_gives_its_decoder_to_fcmae(tmp_path, pictures):
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 20, "epochs": 1, "num_workers": 0}
    pretrain(data=pictures, out=tmp_path / "run", **options)
    assert "encoder with decoder" in convert(tmp_path / "run", tmp_path / "fcmae", to="fcmae")
    assert read_weights(tmp_path / "fcmae").has_decoder
    assert not read_weights(tmp_path / "run").has_decoder
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert read_weights(checkpoint).architecture["image_size"] == (32, 32)
    with pytest.raises(UserError, match="would be replaced by its own conversion"):
        convert(tmp_path / "run", tmp_path / "run" / "exported", to="timm", overwrite=True)


@pytest.mark.parametrize(
    "options",
    [
        {"mask_ratio": 0.25, "decoder_dim": 24, "decoder_depth": 2, "norm_pix_loss": False, "grn_scope": "batch"},
        {"mask_grid": 2, "sparse": False, "grn": False, "layer_scale": True, "stem_stride": 2},
    ],
)
def test_the_model_of_a_run_comes_back_whole(tmp_path, pictures, options):
    pretrain(data=str(pictures), out=str(tmp_path / "run"), image_size=64, batch_size=4, epochs=1, **options)
    model = load_fcmae(tmp_path / "run")
    assert not model.training
    for name, value in options.items():
        own = {"decoder_dim": model.pred.in_channels, "decoder_depth": len(model.decoder)}
        assert own.get(name, getattr(model, name, getattr(model.encoder, name, None))) == value
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_file(checkpoint / "model.safetensors").items())
    assert model.encoder.preprocess(next(pictures.rglob("*.png"))).shape == (1, 3, 64, 64)
    with pytest.raises(UserError, match="no decoder: name a run of `pretrain`"):
        load_fcmae(tmp_path / "run" / "exported")


def test_the_official_pretraining_checkpoint_is_a_whole_model(tmp_path):
    model = randomise(create_fcmae("atto", image_size=64)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint-799.pth")
    images, again = torch.randn(2, 3, 64, 64), load_fcmae(tmp_path / "checkpoint-799.pth")
    mask = torch.tensor([[[True, False], [False, True]]]).expand(2, 2, 2)
    with torch.no_grad():
        for one, other in zip(model(images, mask), again(images, mask), strict=True):
            assert torch.equal(one, other)


def test_files_that_hold_no_weights_are_named(tmp_path, export_encoder):
    state = export_encoder().state_dict()
    whole = (tmp_path / "ours" / "model.safetensors").read_bytes()
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    torch.save({"model": state}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-1000])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.pt").write_bytes(b"x")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    mistakes = {
        "missing": "no such file or folder",
        "empty": "holds no model.safetensors, model.pt, model.pth, pytorch_model.bin, exported encoder or checkpoint",
        "cut.safetensors": "can't be read as safetensors",
        "cut.pt": "can't be read as a PyTorch file",
        "full": "can't be read as a PyTorch file",
        "sharded": "weights in several files",
    }
    states = ({"model": {"a": 1}}, {"model": {1: torch.zeros(1)}}, {"model": {}}, [1])
    for number, content in enumerate(states):
        torch.save(content, tmp_path / f"odd{number}.pt")
        mistakes[f"odd{number}.pt"] = "holds no state_dict"
    for name, message in mistakes.items():
        with pytest.raises(UserError, match=message) as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.0.0.norm.bias": None}, "stages.0.0.norm.bias is missing"),
        ({"extra": torch.zeros(1)}, "extra is unknown"),
        ({"extra\n\x1b[31m" + "x" * 1000: torch.zeros(1)}, r"extra\?\?\[31mx{189} is unknown"),
        ({"stages.0.0.norm.bias": torch.zeros(3)}, r"is \[3\], not \[40\]"),
        ({"stages.0.0.norm.bias": torch.full((40,), torch.nan)}, "stages.0.0.norm.bias has values that are not finite"),
        ({"downsample_layers.0.0.weight": None}, "no ConvNeXt V2 in any layout"),
        ({"downsample_layers.0.0.weight": torch.zeros(3)}, "is missing or no convolution"),
        ({"downsample_layers.0.0.weight": torch.zeros(41, 3, 4, 4)}, "downsample_layers.0.0.weight is"),
        ({"head.weight": torch.zeros(())}, "no head of any classes"),
    ],
)
def test_a_state_that_is_no_convnext_v2_is_named(tmp_path, export_encoder, changes, message):
    state = export_encoder().state_dict() | changes
    save_file({key: value for key, value in state.items() if value is not None}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "x.safetensors")


def test_files_that_hold_themselves_are_refused(tmp_path):
    endless = {"epoch": 3}
    endless["model"] = endless
    pair = {"state_dict": {"module": {}}}
    pair["state_dict"]["module"] = pair
    nested = {"model": {}}
    for _ in range(50):
        nested = {"model": nested, ("a", 1): 2}
    for number, content in enumerate((endless, pair, nested)):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match="wraps its tensors more than 8 times: save the state_dict alone"):
            read_weights(tmp_path / f"{number}.pth")


def test_wrappers_around_each_other_are_taken_off(tmp_path, export_encoder):
    wrapped = export_encoder().state_dict()
    for number in range(8):
        wrapped = {"model": wrapped} if number % 2 else {"state_dict": wrapped, (1, 2): 3, "epoch": 4}
    torch.save(wrapped, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").notes == (
        ("left out what lies beside 'state_dict' in the file: a tuple, epoch",) * 4
    )


BIAS = "stages.0.0.norm.bias"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(40, device="meta"), "has no values, only a shape"),
        (torch.zeros(40).to_sparse(), "is sparse_coo"),
        (torch.zeros(4, 10).to_sparse_csr(), "is sparse_csr"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "is nested"),
        (torch.zeros(40, dtype=torch.complex64), "is complex64"),
        (torch.zeros(40, dtype=torch.int64), "is int64"),
        (torch.zeros(40, dtype=torch.bool), "is bool"),
        (torch.zeros(1).expand(1 << 40), r"of [1099511627776] repeats 4 bytes"),
        (torch.quantize_per_tensor(torch.zeros(40), 0.1, 0, torch.qint8), "is qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(beta|prototype|deprecated).*")
def test_tensors_that_are_no_weights_are_named(tmp_path, export_encoder, value, message):
    state = export_encoder().state_dict() | {BIAS: value}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "x.pth")
    text = str(error.value)
    assert "\n" not in text
    assert f"{BIAS} {message}: weights are dense floating-point tensors" in text or "x.pth can't be read" in text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_two_of_one_tensor_are_refused(tmp_path, export_encoder, prefix):
    state = export_encoder().state_dict()
    state[prefix + BIAS] = torch.ones(40)
    save_file(state, tmp_path / "x.safetensors")
    message = f"holds {prefix}{BIAS} and {BIAS}, which are two of one tensor: remove one of them"
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "x.safetensors")


def test_two_spellings_of_one_tensor_are_refused(tmp_path, export_encoder):
    export_encoder()
    convert(tmp_path / "ours", tmp_path / "theirs", to="huggingface")
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    name = "convnextv2.embeddings.layernorm.bias"
    state[name.removeprefix("convnextv2.")] = torch.ones(40)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="which are two of one tensor"):
        read_weights(tmp_path / "x.safetensors")


def test_json_that_is_nested_without_end(tmp_path, export_encoder):
    export_encoder()
    (tmp_path / "ours" / "config.json").write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(UserError, match=r"config.json can't be read as JSON") as error:
        read_weights(tmp_path / "ours")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        {"pretrained_cfg": None},
        {"pretrained_cfg": {"input_size": None}},
        {"model_type": "convnextv2", "image_size": float("inf")},
        {"model_type": "convnextv2", "id2label": []},
        {"model_type": "convnextv2", "id2label": {"a": "b"}},
        {"format": "sparse-fcmae x", "classes": 3},
        {"format": "sparse-fcmae x", "image_size": {"height": 3}},
    ],
)
def test_odd_configs_are_named(tmp_path, export_encoder, config):
    export_encoder()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json can't be understood"):
        read_weights(tmp_path / "ours")


@pytest.mark.parametrize("config", [[], {}, {"model_type": "vit", "image_size": 384}])
def test_other_configs_are_passed_over(tmp_path, export_encoder, config):
    export_encoder(image_size=64)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path / "ours").architecture["image_size"] == (224, 224)


def test_an_image_size_that_does_not_fit_is_left_out(tmp_path, export_encoder):
    export_encoder()
    (tmp_path / "ours" / "config.json").write_text(json.dumps({"format": "sparse-fcmae encoder", "image_size": 225}))
    weights = read_weights(tmp_path / "ours")
    assert weights.architecture["image_size"] == (224, 224)
    assert "left out the image size 225x225" in weights.notes[0]
