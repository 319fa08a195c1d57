import json
import shutil

import pytest
from PIL import Image

from sparse_fcmae import UserError, evaluate
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

    run = tmp_path / "runs" / "random-seed1"
    assert rows["random", 1]["linear"] == evaluate(data=colours, init=run, linear_probe=True)["linear_probe_top1"]
    config = json.loads((tmp_path / "runs" / "random-seed1-labels2" / "config.json").read_text())
    assert (config["labels_per_class"], config["seed"], config["layer_decay"]) == (2, 1, 1.0)
    (tuned,) = (tmp_path / "runs" / "no-grn-seed1-labels2" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(tuned)["step"] == 2
    losses = [json.loads(x)["loss"] for x in (tmp_path / "runs/no-grn-seed0/metrics.jsonl").read_text().splitlines()]
    assert rows["no-grn", 0]["loss"] == pytest.approx(sum(losses[-6:]) / 6)  # 24 images in batches of 4
    assert means[0]["tuned"] == pytest.approx((rows["no-grn", 0]["tuned"] + rows["no-grn", 1]["tuned"]) / 2)

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    again = ablations(**options, variants="random", seeds="1")
    assert again[0] == rows["random", 1]
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    with pytest.raises(UserError, match="holds runs with another `epochs`: choose another folder"):
        ablations(**options | {"epochs": 8})
    shutil.copytree(colours, tmp_path / "data")
    ablations(**options | {"data": str(tmp_path / "data")}, variants="random", seeds="1")
    (tmp_path / "data" / "val" / "red" / "0.png").rename(tmp_path / "data" / "val" / "red" / "9.png")
    with pytest.raises(UserError, match="holds runs with another `data`: choose another folder"):
        ablations(**options | {"data": str(tmp_path / "data")}, variants="random", seeds="1")


def test_means_and_deviations_over_the_seeds():
    base = [
        {"variant": "base", "seed": seed, "knn": knn, "linear": 0.5, "loss": 0.5} for seed, knn in ((0, 0.2), (1, 0.5))
    ]
    rows = [row | {"labels": labels, "tuned": row["knn"] / labels} for row in base for labels in (1, 10)]
    rows.append({"variant": "dense", "seed": 0, "knn": 0.1, "linear": 0.3, "loss": 0.6})
    first, second, dense = module.means(rows)
    assert (first["variant"], first["labels"], first["seeds"]) == ("base", 1, 2)
    assert (first["knn"], first["knn_sd"]) == pytest.approx((0.35, 0.3 / 2**0.5))
    assert (second["tuned"], second["tuned_sd"]) == pytest.approx((0.035, 0.03 / 2**0.5))
    assert dense == {"variant": "dense", "seeds": 1, "knn": 0.1, "linear": 0.3, "loss": 0.6}


def test_a_mistake_does_not_settle_anything(colours, tmp_path):
    options = SMALL | {"data": str(colours), "out": str(tmp_path / "runs"), "variants": "random", "seeds": "0"}
    for wrong in ({"stem_stride": 4}, {"model": "ato"}, {"batch_size": 25}, {"labels": "9"}):
        with pytest.raises(UserError):
            ablations(**options | wrong)
        assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ablations.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"holds another ablations.json: choose another folder"):
        ablations(**options)
    assert (tmp_path / "runs" / "ablations.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": "base,no GRN"}, "unknown variants 'no GRN': choose of base, no-grn, v1-block"),
        ({"seeds": "one"}, "`seeds` one: give numbers"),
        ({"labels": "0"}, "`labels` 0: give numbers from 1 to 8"),
        ({"data": "."}, "`data` . has no folder train"),
        ({"data": ""}, "`data` is missing: name a folder"),
        ({"seeds": "-1"}, "`seeds` -1: give numbers from 0 on"),
        ({"batch_size": 25}, "`batch_size` 25 is more than the 24 images"),
        ({"image_size": "33"}, "33"),
        ({"labels": "2,9"}, "`labels` 2,9: give numbers from 1 to 8, which the smallest class has"),
    ],
)
def test_wrong_options(colours, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        ablations(**SMALL | {"data": str(colours), "out": str(tmp_path / "runs")} | options)
