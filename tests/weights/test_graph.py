"""The graphs that are exported, each run by its own runtime: values, any batch and size, half precision."""

import sys

import onnxruntime
import pytest
import torch
from helpers import fails, relative_error

from sparse_fcmae import UserError, convert
from sparse_fcmae.model.convnext import SIZES
from sparse_fcmae.weights.convert import export_model

SMALL = "1-1-2-1:8-16-24-32"
NAMES = ["logits", "stage1", "stage2", "stage3", "stage4"]


def by_onnxruntime(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]


RUNTIMES = {
    "onnx": ("model.onnx", by_onnxruntime),
    "torch-export": ("model.pt2", lambda path: torch.export.load(path).module()),
    "aotinductor": ("model.pt2", lambda path: torch._inductor.aoti_load_package(str(path))),
}


@torch.no_grad()
def expected(model, images):
    maps = model.features(images)
    return [model(images), *maps]


@pytest.mark.parametrize("to", ["onnx", "torch-export", pytest.param("aotinductor", marks=pytest.mark.slow)])
def test_any_batch_and_size_and_the_maps_of_all_stages(tmp_path, export_classifier, to):
    model = export_classifier(SMALL)
    text = convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    assert text.count("verified: result run by") == 2
    file, load = RUNTIMES[to]
    run = load(tmp_path / "theirs" / file)
    least = 64 if to == "torch-export" else 32
    for shape in ((1, 3, least, least), (3, 3, 64, 160), (2, 3, 224, 96)):
        images = torch.randn(*shape)
        for ours, theirs in zip(expected(model, images), run(images), strict=True):
            assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize(
    ("to", "options"), [("onnx", {"in_chans": 13, "stem_stride": 2}), ("torch-export", {"stem_stride": 1})]
)
def test_encoders_of_other_stems_and_channels(tmp_path, export_encoder, to, options):
    model = export_encoder(SMALL, **options)
    file, load = RUNTIMES[to]
    convert(tmp_path / "ours", tmp_path / file, to=to)
    images = torch.randn(2, model.in_chans, 3 * model.patch_size, 5 * model.patch_size)
    for ours, theirs in zip(expected(model, images), load(tmp_path / file)(images), strict=True):
        assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_half_precision_is_finite_where_sums_of_squares_are_not(tmp_path, export_classifier, to):
    model = export_classifier(SMALL)
    with torch.no_grad():
        model.stages[0][0].pwconv1.weight.mul_(60)  # so that sums over positions are far beyond 65,504
    export_model(model, tmp_path / "ours")
    file, load = RUNTIMES[to]
    text = convert(tmp_path / "ours", tmp_path / file, to=to, half=True)
    assert "exported the classifier in float16" in text
    images = torch.randn(2, 3, 224, 224)
    for ours, theirs in zip(expected(model, images), load(tmp_path / file)(images.half()), strict=True):
        assert theirs.dtype == torch.float16
        assert theirs.isfinite().all()
        assert relative_error(theirs, ours) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SIZES if name != "huge"])
def test_every_size_at_full_optimisation(tmp_path, export_classifier, name):
    model = export_classifier(name)
    convert(tmp_path / "ours", tmp_path / "model.onnx", to="onnx")
    images = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(expected(model, images), by_onnxruntime(tmp_path / "model.onnx")(images), strict=True):
        assert relative_error(theirs, ours) < 1e-5


def test_outputs_have_names(tmp_path, export_classifier, export_encoder):
    export_classifier(SMALL)
    convert(tmp_path / "ours", tmp_path / "model.onnx", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [output.name for output in session.get_outputs()] == NAMES
    assert session.get_inputs()[0].shape == ["batch", 3, "32*rows", "32*columns"]
    export_encoder(SMALL, folder="encoder", grn_scope="batch")
    assert "pools over each image" in convert(tmp_path / "encoder", tmp_path / "folder", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "folder" / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["features", *NAMES[1:]]
    features, *_, last = session.run(None, {"images": torch.randn(1, 3, 32, 64).numpy()})
    assert features.shape == (1, 32, 1, 2)
    assert (features == last).all()


def test_data_beside_a_graph_is_guarded(tmp_path, export_encoder, monkeypatch):
    export_encoder(SMALL)
    (tmp_path / "m.onnx.data").write_text("precious")
    with pytest.raises(UserError, match=r"m.onnx.data is there already"):
        convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx")
    monkeypatch.setattr("sparse_fcmae.weights.onnx.ONE_FILE", 0)
    convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx", overwrite=True)
    assert (tmp_path / "m.onnx.data").stat().st_size > 1e5
    monkeypatch.setattr("sparse_fcmae.weights.onnx.ONE_FILE", 1e9)
    convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "ours"]


def test_missing_package_is_named(tmp_path, export_encoder, monkeypatch):
    export_encoder()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="`to=onnx` needs onnxscript: pip install"):
        convert(tmp_path / "ours", tmp_path / "x.onnx", to="onnx")


def test_mistakes_in_one_line(tmp_path, export_encoder, monkeypatch, capsys):
    export_encoder(SMALL)
    assert "--half is of the graphs" in fails(
        capsys, "convert", tmp_path / "ours", tmp_path / "x", "--to", "timm", "--half"
    )
    assert "name a folder, or a file that ends in .pt2" in fails(
        capsys, "convert", tmp_path / "ours", tmp_path / "x.onnx", "--to", "torch-export"
    )
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: 1 / 0)
    assert "needs a C++ compiler: division by zero" in fails(
        capsys, "convert", tmp_path / "ours", tmp_path / "x.pt2", "--to", "aotinductor"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]
