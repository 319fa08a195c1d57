import csv
import json
import sys

import pytest
import torch

from sparse_fcmae.backends import NativePatches
from sparse_fcmae.benchmarks import compare as module
from sparse_fcmae.cli import main


def test_compare_gates_and_writes_rows(capsys, monkeypatch, tmp_path):
    options = ["--batch-size", "2", "--image-size", "64", "--rounds", "1", "--drop-path", "0.1"]
    monkeypatch.setitem(sys.modules, "transformers", None)

    def wrong(*_):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1000))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def full_in_training(*given):
        model = module.from_timm(*given)
        model.register_forward_pre_hook(lambda model, _: full() if model.training else None)
        return model

    more = {make.__name__: (make, torch.channels_last) for make in (wrong, full, full_in_training)}
    monkeypatch.setattr(module, "CONVNEXTS", module.CONVNEXTS | more)
    monkeypatch.setitem(module.MVITS, "atto", "mvitv2_tiny")
    main(["bench", "compare", *options, "--json", str(tmp_path / "rows.json")])
    rows = {row["candidate"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["sparse-fcmae"]["ours_over_it"] == 1
    assert rows["timm, channels last"]["ours_over_it"] > 0
    assert rows["timm"]["gmacs"] == pytest.approx(rows["sparse-fcmae"]["gmacs"], rel=1e-6)
    assert rows["timm mvitv2_tiny"]["gmacs"] == pytest.approx(0.33, rel=0.01)
    assert rows["timm mvitv2_tiny"]["ms"] >= rows["timm mvitv2_tiny"]["p20_ms"] > 0
    assert "transformers is not installed" in rows["transformers"]["refused"]
    assert "its logits differ" in rows["wrong"]["refused"]
    assert rows["full"]["refused"] == rows["full_in_training"]["refused"] == "out of memory"
    assert "images/s" in capsys.readouterr().out


def test_compare_refuses_ours_where_it_is_wrong(monkeypatch):
    fused_block = NativePatches.fused_block
    monkeypatch.setattr(NativePatches, "fused_block", lambda self, *given: 1.1 * fused_block(self, *given))
    rows = {row["candidate"]: row for row in module.compare(batch_size=1, image_size="32", rounds=1)}
    assert "its logits differ" in rows["sparse-fcmae"]["refused"]
    assert "refused" not in rows["timm"]


def test_compare_of_pretraining(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(module.VITS, "base", ("small", 48, 2, 2, 16))
    options = ["--task", "pretrain", "--batch-size", "2", "--rounds", "2", "--csv", str(tmp_path / "rows.csv")]
    for more in (["--image-size", "64"], ["--image-size", "64", "--dtype", "bf16"], ["--image-size", "64x96"]):
        main(["bench", "compare", *options, *more])
    with (tmp_path / "rows.csv").open() as file:
        ours, peer, *half, _, refused = csv.DictReader(file)
    assert (ours["candidate"], ours["task"], ours["ours_over_it"]) == ("sparse-fcmae, 60 % masked", "pretrain", "1.0")
    assert peer["candidate"] == "transformers MAE small (the smallest), 75 % masked"
    assert all(float(row["ms"]) > 0 and not row["refused"] for row in (ours, peer, *half))
    assert "square images only" in refused["refused"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["bench", "compare", *options, "--drop-path", "0.1"])
    with pytest.raises(SystemExit):
        main(["bench", "compare", *options, "--image-size", "60"])
