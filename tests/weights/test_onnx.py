"""The graph that is exported to ONNX."""

import sys

import onnxruntime
import pytest
import torch
from helpers import relative_error

from sparse_fcmae import UserError, convert


def test_runs_with_any_batch(tmp_path, export_classifier, export_encoder):
    model = export_classifier(image_size=64)
    assert "run by onnxruntime" in convert(tmp_path / "ours", tmp_path / "model.onnx", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = torch.randn(5, 3, 64, 64)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(logits), model(images)) < 1e-5
    export_encoder(folder="encoder", image_size=32, stem_stride=1)
    convert(tmp_path / "encoder", tmp_path / "folder", to="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "folder" / "model.onnx")
    assert session.run(["features"], {"images": torch.zeros(1, 3, 32, 32).numpy()})[0].shape == (1, 320, 4, 4)


def test_pools_over_each_image(tmp_path, export_encoder):
    export_encoder(image_size=64, grn_scope="batch")
    assert "pools over each image" in convert(tmp_path / "ours", tmp_path / "x.onnx", to="onnx")


def test_data_beside_a_graph_is_guarded(tmp_path, export_encoder, monkeypatch):
    export_encoder(image_size=64)
    (tmp_path / "m.onnx.data").write_text("precious")
    with pytest.raises(UserError, match=r"m.onnx.data is there already"):
        convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx")
    monkeypatch.setattr("sparse_fcmae.weights.onnx.ONE_FILE", 0)
    convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx", overwrite=True)
    assert (tmp_path / "m.onnx.data").stat().st_size > 1e6
    monkeypatch.setattr("sparse_fcmae.weights.onnx.ONE_FILE", 1e9)
    convert(tmp_path / "ours", tmp_path / "m.onnx", to="onnx", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "ours"]


def test_missing_package_is_named(tmp_path, export_encoder, monkeypatch):
    export_encoder()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="`to=onnx` needs onnxscript: pip install"):
        convert(tmp_path / "ours", tmp_path / "x.onnx", to="onnx")
