import argparse
import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import dense_encoder, masks, randomise, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ConvNextV2ForImageClassification, ConvNextV2Model

from sparse_fcmae import (
    UserError,
    convert,
    create_classifier,
    create_encoder,
    create_fcmae,
    load_classifier,
    load_encoder,
    pretrain,
)
from sparse_fcmae.convert import export_model
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.formats.layouts import LAYOUTS, MINKOWSKI
from sparse_fcmae.formats.weights import read_weights, understand

NAMES = ("cat", "dog", "newt")


def exported(folder, name="atto", **options):
    encoder = randomise(create_encoder(name, **options))
    export_model(encoder, folder)
    return encoder


def classifier(folder, name="atto", **options):
    model = randomise(create_classifier(name, num_classes=3, **options)).eval()
    export_model(model, folder, NAMES)
    return model


CASES = [("atto", {}), ("tiny", {}), ("nano", {"in_chans": 1, "stem_stride": 1})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_timm_loads_it_with_equal_features(tmp_path, name, options):
    encoder = exported(tmp_path / "ours", name, **options)
    assert "result run by timm" in convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, encoder.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(model.forward_features(images), encoder(images)) < 1e-5
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert model.pretrained_cfg["mean"] == pytest.approx(config["mean"])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_classifiers_have_equal_logits_in_timm_and_transformers(tmp_path, name, options):
    model = classifier(tmp_path / "ours", name, **options)
    for to in ("timm", "huggingface"):
        convert(tmp_path / "ours", tmp_path / to, to=to)
    there = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    here = ConvNextV2ForImageClassification.from_pretrained(tmp_path / "huggingface").eval()
    images = torch.randn(2, model.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(there(images), model(images)) < 1e-5
        assert relative_error(here(images).logits, model(images)) < 1e-5
    assert here.config.id2label == dict(enumerate(NAMES))
    assert tuple(there.pretrained_cfg["label_names"]) == NAMES


def test_timm_has_no_stem_of_stride_2(tmp_path):
    exported(tmp_path / "ours", stem_stride=2)
    with pytest.raises(UserError, match="timm's ConvNeXt V2 has no stem of stride 2"):
        convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    assert not (tmp_path / "timm").exists()


@pytest.mark.parametrize(("name", "options"), [*CASES, ("atto", {"stem_stride": 2})])
def test_huggingface_loads_it_with_equal_features(tmp_path, name, options):
    encoder = exported(tmp_path / "ours", name, **options)
    assert "result run by transformers" in convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    model, info = ConvNextV2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, encoder.in_chans, 64, 96)
    with torch.no_grad():
        assert relative_error(model.eval()(images).last_hidden_state, encoder(images)) < 1e-5
    assert AutoImageProcessor.from_pretrained(tmp_path / "hf").size["shortest_edge"] == 224


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_every_size(name):
    with torch.device("meta"):
        state = create_classifier(name).state_dict()
        real = timm.create_model(f"convnextv2_{name}").state_dict()
    assert {k: v.shape for k, v in LAYOUTS["timm"].convert(state).items()} == {k: v.shape for k, v in real.items()}


@pytest.mark.parametrize("name", SIZES)
def test_every_round_trip_is_bit_identical(tmp_path, name):
    """official -> ours -> timm -> ours -> Hugging Face -> ours -> mmpretrain -> ours, all eight sizes."""
    with torch.device("meta"):
        state = create_classifier(name, num_classes=5).state_dict()
    state = {key: torch.rand(value.shape) for key, value in state.items()}
    tensors = state
    for layout in ("timm", "huggingface", "mmpretrain", "official"):
        weights = understand({"model": LAYOUTS[layout].convert(tensors)}, tmp_path / "x")
        tensors = weights.state
        assert weights.layout == layout
        assert weights.architecture["name"] == name
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[key], value) for key, value in state.items())


def test_round_trip_through_files_keeps_everything(tmp_path):
    model = classifier(tmp_path / "0", image_size=(64, 96))
    source = tmp_path / "0"
    for i, to in enumerate(("timm", "official", "huggingface", "official", "mmpretrain", "official"), 1):
        report = convert(source, tmp_path / str(i), to=to)
        source = tmp_path / str(i)
    assert report.count("verified") == 1
    again = load_classifier(source)
    assert not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert read_weights(tmp_path / "2").classes == NAMES
    assert read_weights(tmp_path / "2").architecture["image_size"] == (64, 96)
    assert read_weights(tmp_path / "4").classes == NAMES


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
        state = LAYOUTS["fcmae"].convert(create_fcmae("atto").encoder.state_dict())
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


def test_fcmae_layout_keeps_the_decoder_and_comes_back(tmp_path):
    model = randomise(create_fcmae("atto", image_size=64))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "official.pt", to="fcmae")
    found = torch.load(tmp_path / "official.pt", weights_only=True)["model"]
    encoder = {k for k in model.state_dict() if k.startswith("encoder.")}
    assert found.keys() >= model.state_dict().keys() - encoder
    weights = read_weights(tmp_path / "official.pt")
    assert (weights.sparse, weights.has_decoder) == (True, True)
    ours = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
    assert all(torch.equal(weights.state[key], value) for key, value in ours.items())
    assert {name for name, _ in MINKOWSKI}  # the names that differ are in use
    assert sum(key.endswith(".kernel") for key in found) == 12 + 3


def test_other_peoples_variants_are_recognised(tmp_path):
    model = classifier(tmp_path / "ours")
    state = model.state_dict()
    hf = {k.removeprefix("convnextv2."): v for k, v in LAYOUTS["huggingface"].convert(state).items()}
    mm = {k.removeprefix("backbone."): v for k, v in LAYOUTS["mmpretrain"].convert(state).items()}
    in_timm = LAYOUTS["timm"].convert(state).items()
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


def test_onnx_runs_with_any_batch(tmp_path):
    model = classifier(tmp_path / "ours", image_size=64)
    assert "run by onnxruntime" in convert(tmp_path / "ours", tmp_path / "model.onnx", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = torch.randn(5, 3, 64, 64)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(logits), model(images)) < 1e-5
    exported(tmp_path / "encoder", image_size=32, stem_stride=1)
    convert(tmp_path / "encoder", tmp_path / "folder", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "folder" / "model.onnx")
    assert session.run(["features"], {"images": torch.zeros(1, 3, 32, 32).numpy()})[0].shape == (1, 320, 4, 4)


def test_dry_run_reports_and_leaves_nothing(tmp_path):
    exported(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "out", to="timm", dry_run=True)
    assert "would write" in report
    assert "result run by timm" in report
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


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
    assert "left out the decoder: pretraining alone uses it" in report
    assert "added the final norm as the identity" in report
    assert "half of the patches masked" in report
    state = load_encoder(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.encoder.state_dict().items())
    back = read_weights(tmp_path / "timm")
    assert back.state.keys() == state.keys()
    assert "left out the final norm" in back.notes[0]


def test_a_wrong_mapping_is_caught_and_nothing_written(tmp_path, monkeypatch):
    exported(tmp_path / "ours")
    names = LAYOUTS["timm"].names
    swapped = [(r"\.grn\.gamma$", ".mlp.grn.bias"), (r"\.grn\.beta$", ".mlp.grn.weight"), *names]
    monkeypatch.setitem(LAYOUTS, "timm", replace(LAYOUTS["timm"], names=swapped))
    with pytest.raises(UserError, match="differs from the source"):
        convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_reads_back_itself_where_the_library_is_missing(tmp_path, monkeypatch):
    exported(tmp_path / "ours")
    for library, to in (("timm", "timm"), ("transformers", "huggingface")):
        monkeypatch.setitem(sys.modules, library, None)
        report = convert(tmp_path / "ours", tmp_path / to, to=to)
        assert "verified: result read back by sparse-fcmae" in report
        assert f"result not run by the library: {library} is not installed" in report
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="needs onnxscript: pip install"):
        convert(tmp_path / "ours", tmp_path / "x.onnx", to="onnx")


class Evil:
    def __reduce__(self):
        return (print, ("code",))


def test_mistakes_leave_the_destination_untouched(tmp_path, capsys):
    encoder = exported(tmp_path / "ours")
    state = encoder.state_dict()
    weights = tmp_path / "ours" / "model.safetensors"

    def fails(source, message, destination="new", **options):
        with pytest.raises(UserError, match=message) as error:
            convert(tmp_path / source, tmp_path / destination, **{"to": "timm", **options})
        assert "\n" not in str(error.value)
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
    torch.save({"model": state}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-1000])
    fails("cut.pt", "can't be read as a PyTorch file")
    torch.save({"model": state, "evil": Evil()}, tmp_path / "evil.pt")
    fails("evil.pt", "that is code: refused")
    assert "code" not in capsys.readouterr().out
    torch.save({"model": {"a": 1}}, tmp_path / "values.pt")
    fails("values.pt", "holds no state_dict")
    fails(file("a.safetensors", lambda s: s.pop("stages.0.0.norm.bias")), "stages.0.0.norm.bias is missing")
    fails(file("b.safetensors", lambda s: s.update(extra=torch.zeros(1))), "extra is unknown")
    fails(file("c.safetensors", lambda s: s.update({"stages.0.0.norm.bias": torch.zeros(3)})), r"is \[3\], not \[40\]")
    fails(file("d.safetensors", lambda s: s.pop("downsample_layers.0.0.weight")), "no ConvNeXt V2 in any layout")
    stem = {"downsample_layers.0.0.weight": torch.zeros(41, 3, 4, 4)}
    fails(file("e.safetensors", lambda s: s.update(stem)), "a stem of 41 channels is no ConvNeXt V2's")
    nan = {"stages.0.0.norm.bias": torch.full((40,), torch.nan)}
    fails(file("f.safetensors", lambda s: s.update(nan)), "not finite")
    fails("ours", "unknown layout", to="keras")
    fails("ours", "would be replaced by its own conversion", destination="ours")
    fails("whole.pt", "would be replaced by its own conversion", destination="whole.pt", overwrite=True, to="official")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.pt").write_bytes(b"x")
    fails("ours", "not empty", destination="full")
    fails("full", "can't be read as a PyTorch file")
    for number, content in enumerate(({"model": {1: torch.zeros(1)}}, {"model": {}}, [1])):
        torch.save(content, tmp_path / f"odd{number}.pt")
        fails(f"odd{number}.pt", "holds no state_dict")
    fails(file("g.safetensors", lambda s: s.update({"head.weight": torch.zeros(())})), "no head of any classes")
    fails("ours", "name a folder, or a file that ends in .onnx", destination="x.pt", to="onnx")
    fails("ours", "is there already", destination="whole.pt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    fails("ours", "holds more than a conversion", destination="other", overwrite=True)
    assert (tmp_path / "other" / "precious.txt").exists()
    fails("ours", "is a file", destination="ours/config.json")
    with pytest.raises(UserError, match="no classification head"):
        load_classifier(tmp_path / "ours")


@pytest.mark.parametrize(
    "config",
    [
        *(
            {"pretrained_cfg": None},
            {"pretrained_cfg": {"input_size": None}},
            {"model_type": "convnextv2", "id2label": []},
        ),
        *({"model_type": "convnextv2", "id2label": {"a": "b"}}, {"format": "sparse-fcmae x", "classes": 3}),
        {"format": "sparse-fcmae x", "image_size": {"height": 3}},
    ],
)
def test_odd_configs_are_named(tmp_path, config):
    exported(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json can't be understood"):
        read_weights(tmp_path / "ours")


def test_normalisation_and_size_of_the_source_are_kept(tmp_path):
    model = classifier(tmp_path / "ours", image_size=(64, 96))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"mean": [0.5] * 3, "std": [0.25] * 3}))
    for source, to in (("ours", "timm"), ("timm", "huggingface"), ("huggingface", "official")):
        report = convert(tmp_path / source, tmp_path / to, to=to)
        assert ("knows squares only" in report) is (to == "huggingface")
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).pretrained_cfg["mean"] == [0.5] * 3
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "huggingface").image_std) == [0.25] * 3
    weights = read_weights(tmp_path / "official")
    assert (weights.stats, weights.classes) == (((0.5,) * 3, (0.25,) * 3), NAMES)
    with pytest.raises(UserError, match=r"normalised with mean \(0.5"):
        weights.check_usable("x")
    assert "are not in such a file" in convert(tmp_path / "ours", tmp_path / "x.pt", to="official")
    assert model.image_size == (64, 96)


def test_a_runs_folder_gives_its_decoder_to_fcmae(tmp_path, pictures):
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 20, "epochs": 1, "num_workers": 0}
    pretrain(data=pictures, out=tmp_path / "run", **options)
    assert "encoder with decoder" in convert(tmp_path / "run", tmp_path / "fcmae", to="fcmae")
    assert read_weights(tmp_path / "fcmae").has_decoder
    assert not read_weights(tmp_path / "run").has_decoder
    with pytest.raises(UserError, match="would be replaced by its own conversion"):
        convert(tmp_path / "run", tmp_path / "run" / "exported", to="timm", overwrite=True)


def test_headless_and_pooled_sources(tmp_path):
    """timm's names without its final norm; a classifier to fcmae; a pooled encoder to onnx; a head of zeros."""
    model = classifier(tmp_path / "ours")
    state = LAYOUTS["timm"].convert(model.state_dict())
    torch.save({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "headless.pt")
    assert "timm does not take the source" in convert(tmp_path / "headless.pt", tmp_path / "a", to="official")
    convert(tmp_path / "ours", tmp_path / "fcmae", to="fcmae")
    assert "encoder" in json.loads((tmp_path / "fcmae" / "config.json").read_text())["format"]
    exported(tmp_path / "pooled", image_size=64, grn_scope="batch")
    assert "pools over each image" in convert(tmp_path / "pooled", tmp_path / "x.onnx", to="onnx")
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    export_model(model, tmp_path / "zero")


def test_converts_where_torchvision_is_unusable(tmp_path):
    """In a process without what these tests put right: libraries may fail to import, and be said to."""
    exported(tmp_path / "ours")
    for to in ("timm", "huggingface"):
        command = [sys.executable, "-m", "sparse_fcmae", "convert", tmp_path / "ours", tmp_path / to, "--to", to]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "result run by" in done.stdout or "result not run by the library" in done.stdout


def test_link_to_a_folder_has_what_it_names_replaced(tmp_path):
    exported(tmp_path / "ours")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(tmp_path / "ours", tmp_path / "link", to="timm")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").exists()


def test_onnx_data_beside_a_graph_is_guarded(tmp_path, monkeypatch):
    exported(tmp_path / "ours", image_size=64)
    (tmp_path / "m.onnx.data").write_text("precious")
    with pytest.raises(UserError, match=r"m.onnx.data is there already"):
        convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx")
    monkeypatch.setattr("sparse_fcmae.formats.onnx.ONE_FILE", 0)
    convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx", overwrite=True)
    assert (tmp_path / "m.onnx.data").stat().st_size > 1e6
    monkeypatch.setattr("sparse_fcmae.formats.onnx.ONE_FILE", 1e9)
    convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "ours"]


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    exported(tmp_path / "ours")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for name in ("x.pt", "folder"):
        with pytest.raises(UserError, match=r"can't write .*: No space left on device"):
            convert(tmp_path / "ours", tmp_path / name, to="mmpretrain")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_overwrite_replaces_an_earlier_conversion(tmp_path):
    exported(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "out", to="huggingface")
    convert(tmp_path / "ours", tmp_path / "out", to="timm", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "convnextv2_atto"
    for _ in range(2):
        convert(tmp_path / "ours", tmp_path / "one.safetensors", to="timm", overwrite=True)
    assert not list(tmp_path.glob(".*"))
