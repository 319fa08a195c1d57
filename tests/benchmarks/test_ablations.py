import json

import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks import ablations as module
from sparse_fcmae.benchmarks.ablations import ablations
from sparse_fcmae.cli import main

SMALL = {"image_size": "32", "stem_stride": 1, "batch_size": 4, "epochs": 4, "dtype": "fp32"}


def test_variants_are_pretrained_and_judged(colours, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    options = SMALL | {"data": str(colours), "out": str(tmp_path / "runs"), "labels": "2"}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    files = ["--json", str(tmp_path / "rows.json"), "--png", str(tmp_path / "rows.png")]
    main(["bench", "ablations", *flags, "--variants", "no-grn,random", "--seeds", "0,1", *files])
    saved = json.loads((tmp_path / "rows.json").read_text())["rows"]
    rows, means = {(row["variant"], row["seed"]): row for row in saved if "seed" in row}, saved[4:]
    assert list(rows) == [("no-grn", 0), ("random", 0), ("no-grn", 1), ("random", 1)]
    assert [(row["variant"], row["seeds"], row["labels"]) for row in means] == [("no-grn", 2, 2), ("random", 2, 2)]
    assert [epoch for epoch, _ in rows["no-grn", 0]["curve"]] == [0, 1, 2, 3, 4]
    for row in rows.values():
        assert row["knn"] == row["curve"][-1][1]
        assert all(0 <= row[measure] <= 1 for measure in ("linear", "tuned"))
    untrained = [top1 for _, top1 in rows["random", 0]["curve"]]
    assert untrained[0] == untrained[-1]  # its step has changed nothing
    assert means[0]["linear"] == pytest.approx((rows["no-grn", 0]["linear"] + rows["no-grn", 1]["linear"]) / 2)
    assert json.loads((tmp_path / "runs" / "no-grn-seed0" / "config.json").read_text())["grn"] is False
    assert Image.open(tmp_path / "rows.png").width > 800
    assert "k-NN" in capsys.readouterr().out

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    again = ablations(**options, variants="random", seeds="1")
    assert again[0] == rows["random", 1]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    with pytest.raises(UserError, match="holds runs with another `epochs`: choose another folder"):
        ablations(**options | {"epochs": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": "base,no GRN"}, "unknown variants 'no GRN': choose of base, no-grn, v1-block"),
        ({"seeds": "one"}, "`seeds` one: give numbers"),
        ({"labels": "0"}, "`labels` 0: give numbers from 1 on"),
        ({"data": "."}, "`data` . holds no train"),
        ({"image_size": "33"}, "33"),
        ({"labels": "50", "variants": "random"}, "50"),
    ],
)
def test_wrong_options(colours, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ablations(**SMALL | {"data": str(colours), "out": str(tmp_path / "runs")} | options)
