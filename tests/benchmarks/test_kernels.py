import json

from sparse_fcmae.benchmarks.kernels import kernels
from sparse_fcmae.cli import main
from sparse_fcmae.ops import reference


def test_kernels_gates_and_writes_rows(capsys, tmp_path):
    options = ["--batch-size", "1", "--image-size", "64x96", "--mask-ratio", "0.5", "--rounds", "1"]
    for dtype in ("fp32", "bf16"):
        main(["bench", "kernels", *options, "--dtype", dtype, "--json", str(tmp_path / "rows.json"), "--device", "cpu"])
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert len(rows) == (4 * 4 + 2) * 2
        assert all(row["of_bound"] > 0 and row["over_reference"] > 0 for row in rows)
    assert "refused" not in capsys.readouterr().out


def test_kernels_refuses_wrong_results(monkeypatch):
    exact = reference.gelu_grn
    monkeypatch.setattr(reference, "gelu_grn", lambda *arguments: 1.01 * exact(*arguments))
    rows = kernels(batch_size=1, image_size="64", mask_ratio=0.5, rounds=1, device="cpu")
    assert {row["op"] for row in rows if "refused" in row} == {"gelu_grn", "convnext_block"}
