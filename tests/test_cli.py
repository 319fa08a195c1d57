import csv
import json
import sys
from dataclasses import MISSING, fields

import pytest
import torch
from PIL import Image

from sparse_fcmae.cli import COMMANDS, main
from sparse_fcmae.config import flag
from sparse_fcmae.demo import CLASSES, draw_image, draw_images


def test_info_names_every_backend(capsys):
    main(["info"])
    output = capsys.readouterr().out
    assert output.startswith("sparse-fcmae 0.1.0, torch ")
    for name in ("native", "torch", "masked"):
        assert f"backend {name}" in output


@pytest.mark.parametrize(
    "arguments",
    [[], ["pretrian"], ["pretrain", "--epoch"], ["pretrain", "--dtype", "fp8"], ["convert", "a", "b"], ["bench"]],
)
def test_a_wrong_command_line_is_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_every_flag_with_its_default(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(COMMANDS[command][1]) if COMMANDS[command][1] else ():
        help_text = field.metadata["help"] % ()
        if not any(field.default is silent for silent in (MISSING, None, True, False)):
            help_text += f" [{field.default}]"
        assert help_text in text
        assert (field.name.upper() if field.metadata["positional"] else flag(field.name)) in text


def test_bench_kernels_gates_and_writes_rows(capsys, tmp_path):
    options = ["--batch-size", "1", "--image-size", "64x96", "--mask-ratio", "0.5", "--rounds", "1"]
    for dtype in ("fp32", "bf16"):
        main(["bench", "kernels", *options, "--dtype", dtype, "--json", str(tmp_path / "rows.json")])
        rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
        assert len(rows) == 4 * 4 * 2
        assert all(row["of_bound"] > 0 and row["over_reference"] > 0 for row in rows)
    assert "refused" not in capsys.readouterr().out


def test_bench_profile_names_kernels_and_matrix_products(capsys, tmp_path):
    options = ["--batch-size", "2", "--image-size", "64", "--mask-ratio", "0", "--rounds", "1", "--dtype", "bf16"]
    main(["bench", "profile", *options, "--json", str(tmp_path / "profile.json")])
    rows = {row["what"]: row for row in json.loads((tmp_path / "profile.json").read_text())["rows"]}
    assert rows["matrix products"]["bytes"] > 0
    assert rows["kernel gelu_grn_backward"]["calls"] == 12
    assert "MB moved" in capsys.readouterr().out


def test_throughput_without_a_mask():
    from sparse_fcmae.benchmarks.throughput import throughput

    rows = throughput(batch_size=1, image_size="64", rounds=1, mask_ratio=0)
    assert not [row for row in rows if "refused" in row]


def test_bench_kernels_refuses_wrong_results(capsys, monkeypatch):
    from sparse_fcmae.benchmarks.kernels import kernels
    from sparse_fcmae.ops import reference

    exact = reference.gelu_grn
    monkeypatch.setattr(reference, "gelu_grn", lambda *arguments: 1.01 * exact(*arguments))
    rows = kernels(batch_size=1, image_size="64", mask_ratio=0.5, rounds=1)
    assert {row["op"] for row in rows if "refused" in row} == {"gelu_grn", "convnext_block"}
    with pytest.raises(SystemExit) as stop:
        main(["bench", "kernels", "--model", "nano2"])
    assert stop.value.code == 2


def test_bench_compare_gates_and_writes_rows(capsys, monkeypatch, tmp_path):
    from sparse_fcmae.benchmarks import compare

    options = ["--batch-size", "2", "--image-size", "64", "--rounds", "1", "--drop-path", "0.1"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    wrong = {
        "wrong": (
            lambda *a: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1000)),
            torch.channels_last,
        )
    }
    monkeypatch.setattr(compare, "CANDIDATES", compare.CANDIDATES | wrong)
    main(["bench", "compare", *options, "--json", str(tmp_path / "rows.json")])
    rows = {row["candidate"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["sparse-fcmae"]["ours_over_it"] == 1
    assert rows["timm, channels last"]["ours_over_it"] > 0
    assert "can't be imported" in rows["transformers"]["refused"]
    assert "its logits differ" in rows["wrong"]["refused"]
    assert "images/s" in capsys.readouterr().out


def test_bench_gpu_appends_rows(capsys, tmp_path):
    options = ["--device", "cpu", "--models", "atto", "--image-size", "64", "--rounds", "1", "--batch-sizes", "2,1"]
    for _ in range(2):
        main(["bench", "gpu", *options, "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["candidate"] for row in rows} == {"native", "torch", "masked", "native, nothing masked"}
    assert len(rows) == 2 * 2 * (4 + 3)
    assert all(float(row["ms"]) > 0 and row["torch"] == torch.__version__ and row["commit"] for row in rows)
    assert "over masked" in capsys.readouterr().out
    wrong = {"--mask-ratio": 1.5, "--batch-sizes": "64,many", "--models": "atto,giga", "--csv": tmp_path / "no" / "x"}
    for name, value in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main(["bench", "gpu", *options, name, str(value)])
        assert stop.value.code == 2
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["bench", "gpu", "--csv", str(tmp_path / "none.csv")])
        assert "give --device cpu" in capsys.readouterr().err
        assert not (tmp_path / "none.csv").exists()


def test_convert_prints_what_it_did(capsys, tmp_path, pictures):
    run = tmp_path / "demo"
    main(["demo", "--out", str(run), "--images", "100", "--epochs", "1"])
    assert f"reconstructions/step-{1:08d}.png" in capsys.readouterr().out
    assert Image.open(run / "run" / "reconstructions" / "step-00000001.png").size[0] > 300
    main(["convert", str(run / "run"), str(tmp_path / "hf"), "--to", "huggingface"])
    assert "verified: result run by transformers" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(run)])
    assert "give --overwrite" in capsys.readouterr().err
    own = tmp_path / "data" / "images" / "holiday.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "data"), "--overwrite"])
    assert "holds no demo" in capsys.readouterr().err
    assert own.read_bytes() == b"mine"


def test_drawn_images_are_deterministic_and_labelled(tmp_path):
    assert draw_image(3, (0, 1)).tobytes() == draw_image(3, (0, 1)).tobytes()
    assert draw_image(3, (0, 1)).tobytes() != draw_image(3, (0, 2)).tobytes()
    draw_images(tmp_path / "x", 30, seed=1)
    assert {p.name: len(list(p.iterdir())) for p in (tmp_path / "x").iterdir()} == dict.fromkeys(CLASSES, 3)


def test_throughput_reports_every_backend(capsys, tmp_path):
    options = ["--batch-size", "2", "--image-size", "64", "--rounds", "1", "--mask-ratio", "0.5"]
    main(["bench", "throughput", *options, "--json", str(tmp_path / "rows.json")])
    rows = {row["backend"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert set(rows) == {"native", "torch", "masked"}
    assert rows["masked"]["speedup"] == 1
    assert 0 < rows["native"]["kept_mb"] < rows["torch"]["kept_mb"] < rows["masked"]["kept_mb"]
    assert rows["native"]["forward_error"] < 1e-5
    assert "images/s" in capsys.readouterr().out


def test_throughput_checks_bf16_as_well(capsys):
    from sparse_fcmae.benchmarks.throughput import throughput

    rows = throughput(batch_size=2, image_size="64", rounds=1, mask_ratio=0.5, dtype="bf16")
    assert not [row for row in rows if "refused" in row]
    assert all(1e-4 < row["forward_error"] < 0.05 for row in rows)


def test_throughput_refuses_a_backend_that_is_wrong(monkeypatch):
    from sparse_fcmae.backends import NativeLayout
    from sparse_fcmae.benchmarks.throughput import throughput

    leave = NativeLayout.leave
    monkeypatch.setattr(NativeLayout, "leave", lambda self, x: leave(self, x) * 1.01)
    rows = throughput(batch_size=1, image_size="64", rounds=1, mask_ratio=0.5)
    assert {row["backend"]: row.get("refused") for row in rows} == {
        **{"native": "features or gradients differ", "torch": None, "masked": None}
    }
