"""Each library's layout: its names and shapes, there and back, and what the real library makes of it."""

import argparse
import json
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import dense_encoder, masks, relative_error
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ConvNextV2ForImageClassification, ConvNextV2Model

from sparse_fcmae import UserError, convert, create_classifier, create_fcmae, load_encoder
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.weights import config
from sparse_fcmae.weights.adapter import Adapter
from sparse_fcmae.weights.adapters import ADAPTERS, TARGETS
from sparse_fcmae.weights.fcmae import Fcmae
from sparse_fcmae.weights.read import understand
from sparse_fcmae.weights.timm import Timm

MODELS = [
    ("atto", {}),
    ("tiny", {}),
    ("nano", {"in_chans": 1, "stem_stride": 1}),
    ("1-2-4-1:24-48-56-112", {}),
    ("2-3-7-2:40-80-160-320", {}),  # as wide as atto, whose pointwise layers are convolutions in timm
]


def test_the_option_names_every_target_and_needs_no_torch():
    assert sorted(config.TARGETS) == sorted(TARGETS)
    assert [target for target in TARGETS.values() if isinstance(target, Adapter)] == list(ADAPTERS)
    code = "import sys, sparse_fcmae.weights.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_each_layout_is_recognised_as_itself(adapter):
    with torch.device("meta"):
        names = adapter.from_official(create_classifier("atto").state_dict())
    assert next(other for other in ADAPTERS if other.recognises(names)) is adapter
    assert all(adapter.usual(name) == name for name in names if adapter.name != "official")


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_every_size_are_timms(name):
    with torch.device("meta"):
        state = create_classifier(name).state_dict()
        real = timm.create_model(f"convnextv2_{name}").state_dict()
    assert {k: v.shape for k, v in Timm().from_official(state).items()} == {k: v.shape for k, v in real.items()}


@pytest.mark.parametrize("name", SIZES)
def test_every_round_trip_is_bit_identical(tmp_path, name):
    """official -> timm -> official -> Hugging Face -> official -> mmpretrain -> official, all eight sizes."""
    with torch.device("meta"):
        state = create_classifier(name, num_classes=5).state_dict()
    state = {key: torch.rand(value.shape) for key, value in state.items()}
    tensors = state
    for layout in ("timm", "huggingface", "mmpretrain", "official"):
        weights = understand(TARGETS[layout].from_official(tensors), tmp_path / "x")
        tensors = weights.state
        assert weights.layout == layout
        assert weights.architecture["name"] == name
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], value) for key, value in state.items())


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_timm_loads_it_with_equal_features(tmp_path, export_encoder, name, options):
    encoder = export_encoder(name, **options)
    assert "result run by timm" in convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, encoder.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(model.forward_features(images), encoder(images)) < 1e-5
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert [255 * mean for mean in model.pretrained_cfg["mean"]] == pytest.approx(ours["mean"])


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_classifiers_have_equal_logits_in_timm_and_transformers(tmp_path, export_classifier, name, options):
    model = export_classifier(name, **options)
    for to in ("timm", "huggingface"):
        convert(tmp_path / "ours", tmp_path / to, to=to)
    there = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    here = ConvNextV2ForImageClassification.from_pretrained(tmp_path / "huggingface").eval()
    images = torch.randn(2, model.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(there(images), model(images)) < 1e-5
        assert relative_error(here(images).logits, model(images)) < 1e-5
    assert here.config.id2label == {0: "cat", 1: "dog", 2: "newt"}
    assert tuple(there.pretrained_cfg["label_names"]) == ("cat", "dog", "newt")


@pytest.mark.parametrize(("name", "options"), [*MODELS, ("atto", {"stem_stride": 2})])
def test_huggingface_loads_it_with_equal_features(tmp_path, export_encoder, name, options):
    encoder = export_encoder(name, **options)
    assert "result run by transformers" in convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    model, info = ConvNextV2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, encoder.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(model.eval()(images).last_hidden_state, encoder(images)) < 1e-5
    assert AutoImageProcessor.from_pretrained(tmp_path / "hf").size["shortest_edge"] == 224


def test_timm_has_no_stem_of_stride_2(tmp_path, export_encoder):
    """A folder for timm is refused. A file under timm's names can be written and converted."""
    export_encoder(stem_stride=2)
    with pytest.raises(UserError, match="timm's ConvNeXt V2 has no stem of stride 2: give `to=huggingface`"):
        convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    assert not (tmp_path / "timm").exists()
    convert(tmp_path / "ours", tmp_path / "timm.pt", to="timm")
    assert "timm does not take the source" in convert(tmp_path / "timm.pt", tmp_path / "again", to="official")


def test_mmpretrains_config_is_python(tmp_path, export_classifier):
    export_classifier(in_chans=1)
    convert(tmp_path / "ours", tmp_path / "mm", to="mmpretrain")
    found = {}
    exec((tmp_path / "mm" / "config.py").read_text(), found)
    assert found["model"]["backbone"]["arch"] == "atto"
    assert found["model"]["head"]["num_classes"] == found["data_preprocessor"]["num_classes"] == 3
    assert len(found["data_preprocessor"]["mean"]) == 1


def test_converts_where_torchvision_is_unusable(tmp_path, export_encoder):
    """In a process without what these tests put right: libraries may fail to import, and be said to."""
    export_encoder()
    for to in ("timm", "huggingface"):
        command = [sys.executable, "-m", "sparse_fcmae", "convert", tmp_path / "ours", tmp_path / to, "--to", to]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "result run by" in done.stdout or "result not run by the library" in done.stdout


def sparse_convolution(features, kernel, bias, size, stride=1):
    """MinkowskiEngine's: a kernel [k * k, in, out] or [k * k, C] whose first coordinate, the row, runs fastest, over
    features by (image, row, column), where there are outputs."""
    taps = [(i % size, i // size) for i in range(size * size)]
    reach = size // 2 if stride == 1 else 0
    out = {}
    for b, y, x in features if stride == 1 else {(b, y // stride, x // stride) for b, y, x in features}:
        total = bias[0].clone()
        for weight, (dy, dx) in zip(kernel, taps, strict=True):
            value = features.get((b, y * stride + dy - reach, x * stride + dx - reach))
            if value is not None:
                total += value * weight if weight.dim() == 1 else value @ weight
        out[b, y, x] = total
    return out


def minkowski_encoder(state, images, mask):
    """The official sparse model's forward pass, GRN over each image, from its own names: features by position."""
    state = {key.removeprefix("encoder."): value for key, value in state.items()}
    stem = "downsample_layers.0"
    x = F.conv2d(images, state[f"{stem}.0.weight"], state[f"{stem}.0.bias"], stride=4).permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[-1:], state[f"{stem}.1.weight"], state[f"{stem}.1.bias"], 1e-6)
    visible = (~mask).repeat_interleave(8, 1).repeat_interleave(8, 2)
    features = {tuple(place): x[tuple(place)] for place in visible.nonzero().tolist()}

    def each(features, function):
        return dict(zip(features, function(torch.stack(list(features.values()))), strict=True))

    def norm(name):
        return lambda x: F.layer_norm(x, x.shape[-1:], state[f"{name}.ln.weight"], state[f"{name}.ln.bias"], 1e-6)

    def linear(name):
        return lambda x: F.linear(x, state[f"{name}.linear.weight"], state[f"{name}.linear.bias"])

    for stage in range(4):
        if stage:
            name = f"downsample_layers.{stage}"
            features = each(features, norm(f"{name}.0"))
            features = sparse_convolution(features, state[f"{name}.1.kernel"], state[f"{name}.1.bias"], 2, 2)
        for block in range(SIZES["atto"][0][stage]):
            name = f"stages.{stage}.{block}"
            y = sparse_convolution(features, state[f"{name}.dwconv.kernel"], state[f"{name}.dwconv.bias"], 7)
            y = each(y, lambda x, n=name: F.gelu(linear(f"{n}.pwconv1")(norm(f"{n}.norm")(x))))
            for image in {b for b, _, _ in y}:
                own = {place: h for place, h in y.items() if place[0] == image}
                h = torch.stack(list(own.values()))
                response = h.norm(dim=0, keepdim=True)
                h = state[f"{name}.grn.gamma"] * h * response / (response.mean() + 1e-6) + state[f"{name}.grn.beta"] + h
                y |= dict(zip(own, h, strict=True))
            y = each(y, linear(f"{name}.pwconv2"))
            features = {place: x + y[place] for place, x in features.items()}
    return features


@pytest.mark.parametrize("kind", ["none", "ragged"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_minkowski_checkpoint_gives_minkowskis_features(tmp_path, kind, wrapped):
    """Every tensor random and asymmetric, so that a transposed kernel shows."""
    with torch.device("meta"):
        state = Fcmae().from_official(create_fcmae("atto").encoder.state_dict())
    state = {key: 0.2 * torch.randn(value.shape, dtype=torch.float64) for key, value in state.items()}
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, 40)
    assert state["encoder.downsample_layers.1.1.kernel"].shape == (4, 40, 80)
    assert state["encoder.stages.0.0.dwconv.bias"].shape == state["encoder.stages.0.0.dwconv.bias"].shape == (1, 40)
    assert state["encoder.stages.0.0.grn.gamma"].shape == (1, 160)
    mask = masks(2, 2)[kind]
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected = torch.zeros(3, 320, 2, 2, dtype=torch.float64)
    for (b, y, x), value in minkowski_encoder(state, images, mask).items():
        expected[b, :, y, x] = value
    file = tmp_path / "fcmae.pt"
    prefix = "module." if wrapped else ""
    state = {prefix + key: value.float() for key, value in state.items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1), "epoch": 3} if wrapped else state, file)
    report = convert(file, tmp_path / "dense", to="official")
    assert "half of the patches masked" in report
    assert ("args, epoch" in report) is wrapped
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert relative_error(dense_encoder(dense, images.float(), mask), expected) < 1e-5
    assert relative_error(load_encoder(file)(images.float(), mask), expected) < 1e-5
