"""Weights as people have them: inside other models, beside other objects, under other names, on the hub."""

import collections
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import randomise, relative_error
from hub import hub
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ConvNextV2Backbone, ConvNextV2Config

from sparse_fcmae import UserError, convert, embed, load_encoder, load_transform
from sparse_fcmae.weights.read import read_weights


@pytest.fixture
def state(export_encoder):
    return export_encoder().state_dict()


def same(found, state):
    return found.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in found.items())


BESIDE = {
    "fpn.lateral.weight": torch.zeros(3),
    "norm.num_batches_tracked": torch.tensor(3),
    "head.weight": torch.ones(7),
}


@pytest.mark.parametrize("layout", ["official", "timm", "huggingface", "mmpretrain", "fcmae"])
@pytest.mark.parametrize("prefix", ["backbone.", "encoder.model.", "module.net.body.0."])
def test_an_encoder_within_another_model(tmp_path, state, layout, prefix):
    convert(tmp_path / "ours", tmp_path / "theirs.safetensors", to=layout)
    theirs = load_file(tmp_path / "theirs.safetensors")
    inside = {prefix + name: value for name, value in theirs.items()}
    torch.save({"state_dict": inside | BESIDE, "epoch": 3}, tmp_path / "detector.pth")
    weights = read_weights(tmp_path / "detector.pth")
    assert same(weights.without("norm"), state)
    place = prefix.removeprefix("module.")
    assert weights.notes[1] == f"took the encoder at {place}"
    assert weights.notes[2] == "left out what is no part of the encoder: " + ", ".join(sorted(BESIDE))


def test_an_encoder_beside_a_head_of_ones_own(tmp_path, state):
    """No mask token lies beside it, so that it is no model for pretraining, whose decoder would be known."""
    others = {"head.weight": torch.zeros(5, 320), "decoder.up.weight": torch.zeros(3)}
    save_file({f"encoder.{name}": value for name, value in state.items()} | others, tmp_path / "x.safetensors")
    weights = read_weights(tmp_path / "x.safetensors")
    assert same(weights.state, state)
    assert weights.notes == (
        "took the encoder at encoder.",
        "left out what is no part of the encoder: decoder.up.weight, head.weight",
    )


def test_what_was_left_out_is_said(tmp_path, state, caplog, colours, capsys):
    save_file({f"net.{name}": value for name, value in state.items()} | BESIDE, tmp_path / "x.safetensors")
    load_encoder(tmp_path / "x.safetensors")
    beside = "left out what is no part of the encoder: " + ", ".join(sorted(BESIDE))
    assert f"{tmp_path / 'x.safetensors'}: {beside}" in caplog.text
    data = {"data": colours / "val", "init": tmp_path / "x.safetensors", "image_size": 32, "num_workers": 0}
    embed(**data, out=tmp_path / "x.npz")
    assert beside in capsys.readouterr().out


def test_of_two_encoders_none_is_chosen(tmp_path, state):
    two = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    torch.save(two, tmp_path / "x.pth")
    message = "holds 2 encoders, at student. and teacher.: save the tensors of one of them alone"
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "x.pth")


def test_timms_features_only(tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model("convnextv2_atto", features_only=True))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    images = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(load_encoder(tmp_path / "x.safetensors").features(images), model(images), strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_transformers_backbone_as_a_folder_and_in_a_detector(tmp_path):
    torch.manual_seed(0)
    config = ConvNextV2Config(
        depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 16, 24], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    model = randomise(ConvNextV2Backbone(config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    detector = {f"model.backbone.conv_encoder.model.{name}": value for name, value in model.state_dict().items()}
    torch.save(detector | {"model.query.weight": torch.zeros(2)}, tmp_path / "detector.bin")
    images = torch.randn(1, 3, 64, 96)
    norms = list(model.hidden_states_norms.values())
    for name in ("theirs", "detector.bin"):
        assert "left out norms of single stages, which huggingface adds: hidden_states_norms" in " ".join(
            read_weights(tmp_path / name).notes
        )
        maps = load_encoder(tmp_path / name).features(images)
        for norm, ours, theirs in zip(norms, maps, model(images).feature_maps, strict=True):
            assert relative_error(norm(ours), theirs) < 1e-5


def test_the_official_codes_backbone_for_segmentation(tmp_path, state):
    norms = {f"norm{i}.{name}": torch.ones(40 << i) for i in range(4) for name in ("weight", "bias")}
    inside = {f"backbone.{name}": value for name, value in (state | norms).items()}
    torch.save({"state_dict": inside | {"decode_head.conv.weight": torch.zeros(1)}, "meta": {}}, tmp_path / "x.pth")
    assert same(read_weights(tmp_path / "x.pth").state, state)


class Sampler:
    def __init__(self):
        self.seed = 3


class Printing:
    def __reduce__(self):
        return (print, ("code was run",))


class Running:
    def __reduce__(self):
        return (os.system, ("true",))


def test_objects_beside_the_tensors_are_left_out_and_nothing_is_run(tmp_path, state, capsys):
    beside = {"sampler": Sampler(), "hook": Printing(), "best": np.float64(0.5), "where": tmp_path, "step": 4}
    torch.save({"state_dict": state, **beside}, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert same(weights.state, state)
    first, second = weights.notes
    assert first.startswith("left out objects of foreign classes, whose code was not run: ")
    assert all(name in first for name in ("Sampler", "print", "Path", "scalar"))
    assert second == "left out what lies beside 'state_dict' in the file: best, hook, sampler, step, where"
    assert "code was run" not in capsys.readouterr().out
    torch.save({**state, "sampler": Sampler(), 3: None, "epoch": 7}, tmp_path / "flat.pth")
    weights = read_weights(tmp_path / "flat.pth")
    assert same(weights.state, state)
    assert weights.notes[1] == "left out what is no tensor with a name: a int, epoch, sampler"


def test_what_would_run_programs_is_refused(tmp_path, state):
    torch.save({"state_dict": state, "hook": Running()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"needs posix.system to be read, that is code: refused"):
        read_weights(tmp_path / "x.pth")
    torch.save({"state_dict": state, "hook": Sampler()}, tmp_path / "y.pth", pickle_protocol=4)
    with pytest.raises(UserError, match=r"y.pth .*read as a PyTorch file") as error:
        read_weights(tmp_path / "y.pth")
    assert "\n" not in str(error.value)


def test_long_lists_of_what_is_left_out_are_cut(tmp_path, state):
    torch.save({"model": state, **{f"x{i:02d}": i for i in range(30)}}, tmp_path / "x.pth")
    (note,) = read_weights(tmp_path / "x.pth").notes
    assert note.endswith(": x00, x01, x02, x03, x04, x05, x06, x07, x08, x09 and 20 more")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.1, 0.2, 0.3]},
    ],
)
def test_images_are_normalised_as_the_processor_does(tmp_path, export_encoder, changes):
    export_encoder()
    convert(tmp_path / "ours", tmp_path / "theirs", to="huggingface")
    file = tmp_path / "theirs" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": 384}} | changes))
    configuration = tmp_path / "theirs" / "config.json"
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"image_size": 384}))
    image = Image.fromarray(np.full((384, 384, 3), (51, 102, 153), np.uint8))
    expected = AutoImageProcessor.from_pretrained(tmp_path / "theirs")(image, return_tensors="pt")["pixel_values"][0]
    ours = load_transform(tmp_path / "theirs")(image)
    assert ours.shape == expected.shape
    assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("huggingface", {"depths": [3, 3, 9, 3]}, r"says depths \[3, 3, 9, 3\], its tensors have"),
        ("huggingface", {"patch_size": 2}, "says patch_size 2, its tensors have 4"),
        ("huggingface", {"id2label": {"0": "a"}}, "names 1 classes, its head has 3 outputs"),
        ("timm", {"architecture": "convnextv2_tiny"}, "says architecture convnextv2_tiny, its tensors have"),
        ("timm", {"num_classes": 9}, "says num_classes 9, its tensors have 3"),
        ("timm", {"model_args": {"in_chans": 4}}, "says in_chans 4, its tensors have 3"),
        ("official", {"stem_stride": 2}, "says stem_stride 2, its tensors have 4"),
    ],
)
def test_configs_of_another_shape_are_refused(tmp_path, export_classifier, to, changes, message):
    export_classifier()
    convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=f"its config.json {message}"):
        read_weights(tmp_path / "theirs")


@pytest.mark.parametrize("of", [{"model_type": None}, {"model_type": "bert"}])
def test_a_setting_is_refused_whatever_model_the_config_says_it_is_of(tmp_path, export_encoder, of):
    export_encoder()
    convert(tmp_path / "ours", tmp_path / "theirs", to="huggingface")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text()) | of
    file.write_text(json.dumps(config))
    assert "left" in read_weights(tmp_path / "theirs").notes[-1]
    file.write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act 'relu'"):
        read_weights(tmp_path / "theirs")


@pytest.mark.parametrize("stride", [8, 3])
def test_a_stem_of_another_stride_is_named_with_its_file(tmp_path, state, stride):
    state = state | {"downsample_layers.0.0.weight": torch.zeros(40, 3, stride, stride)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x.safetensors: .* a stem of stride {stride}: it has to be one of 4, 2, 1"):
        read_weights(tmp_path / "x.safetensors")


PROGRAM = """
import sys
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from sparse_fcmae import UserError, load_encoder
for name in sys.argv[1:]:
    try:
        print(load_encoder(name).stages[3][0].norm.bias.sum().item())
    except UserError as error:
        print(error)
"""


def test_public_weights_by_name(tmp_path, export_encoder):
    encoder = export_encoder()
    convert(tmp_path / "ours", tmp_path / "theirs", to="timm")
    (tmp_path / "theirs" / "README.md").write_text("# a model")
    expected = encoder.stages[3][0].norm.bias.sum().item()
    names = ["timm:convnextv2_atto.fcmae", "hf:timm/convnextv2_atto.fcmae"]
    wrong = ["hf:someone/nothing", "timm:convnextv2_atto.mine", "timm:resnet"]

    def loaded(place, names):
        command = [sys.executable, "-c", PROGRAM, *names]
        done = subprocess.run(command, env=dict(os.environ) | place, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with hub(tmp_path / "theirs", "timm/convnextv2_atto.fcmae", "models", tmp_path / "home") as place:
        first, second, missing, *unknown = loaded(place, names + wrong)
    assert [float(first), float(second)] == pytest.approx([expected] * 2, rel=1e-6)
    assert missing.startswith("hf:someone/nothing can't be downloaded from someone/nothing: ")
    assert [line.partition(": timm has no such weights")[0] for line in unknown] == wrong[1:]
    kept = [path.name for path in (tmp_path / "home").rglob("*") if path.suffix in (".md", ".safetensors")]
    assert kept == ["model.safetensors"]
    offline = loaded(place | {"HF_HUB_OFFLINE": "1"}, [*names, "hf:someone/other"])
    assert [float(value) for value in offline[:2]] == pytest.approx([expected] * 2, rel=1e-6)
    assert offline[2].startswith("hf:someone/other can't be downloaded")


def test_kinds_of_dictionaries_and_lists_beside_the_tensors(tmp_path, state):
    losses = collections.defaultdict(list, {"train": [0.3]})
    torch.save({"state_dict": state, "losses": losses, "last": collections.deque([1, 2])}, tmp_path / "x.pth")
    assert same(read_weights(tmp_path / "x.pth").state, state)
    torch.save({"model": {"depth": 3}, "state_dict": state}, tmp_path / "y.pth")
    assert same(read_weights(tmp_path / "y.pth").state, state)
    torch.save({"state_dict": state, "options": Options(a=1)}, tmp_path / "z.pth")
    with pytest.raises(UserError, match="holds an object beside the tensors that is filled piece by piece"):
        read_weights(tmp_path / "z.pth")


class Options(dict):
    pass


@pytest.mark.parametrize("to", ["official", "timm", "huggingface"])
def test_names_of_other_classes_than_the_head_has_are_refused(tmp_path, export_classifier, to):
    export_classifier()
    convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    names = {"classes": ["a", "b"], "label_names": ["a", "b", "c", "d"], "id2label": {"1": "a", "2": "b", "3": "c"}}
    key = {"official": "classes", "timm": "label_names", "huggingface": "id2label"}[to]
    file.write_text(json.dumps(config | {key: names[key]}))
    message = "id2label does not count its classes from 0" if to == "huggingface" else "its head has 3 outputs"
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"do_normalize": False}, 0, 255),
        ({"do_normalize": False, "do_rescale": False}, 0, 1),
        ({"do_normalize": True}, 127.5, 127.5),
    ],
)
def test_processors_that_do_not_say_their_statistics(tmp_path, export_encoder, processor, mean, std):
    export_encoder()
    convert(tmp_path / "ours", tmp_path / "theirs", to="huggingface")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    form = read_weights(tmp_path / "theirs").form
    assert form.mean == pytest.approx([mean] * 3)
    assert form.std == pytest.approx([std] * 3)


@pytest.mark.parametrize(
    "others",
    [{"mask_token": torch.zeros(1, 99)}, {"mask_token": torch.zeros(1), "decoder.conv.weight": torch.zeros(3)}],
)
def test_another_models_decoder_is_not_taken_for_ours(tmp_path, state, others):
    save_file({f"encoder.{name}": value for name, value in state.items()} | others, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"is no ConvNeXt V2 atto: .* is missing"):
        read_weights(tmp_path / "x.safetensors")
