import os
from dataclasses import MISSING, fields

import pytest
from PIL import Image

from sparse_fcmae.cli import COMMANDS, SPINS, load, main, spin_briefly
from sparse_fcmae.demo import CLASSES, draw_image, draw_images
from sparse_fcmae.runtime.options import as_flags, flag
from sparse_fcmae.tasks.config import FinetuneConfig, PretrainConfig


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--epochs", "3", "--epochs", "4"], "--epochs is given twice"),
        (["pretrain", "--norm-pix-loss", "--no-norm-pix-loss"], "--norm-pix-loss is given twice"),
        (["finetune", "--labels", "3"], "unknown arguments: --labels 3; is --labels-per-class meant?"),
        (["pretrain", "--epohcs", "3"], "is --epochs meant?"),
        (["convert", "a", "b", "c", "--to", "timm"], "unknown arguments: c"),
        (["evaluate", "--dta", "x", "--init", "y"], "unknown arguments: --dta x; is --data meant?"),
        (["evaluate", "--data", "x"], "--init is missing: weights"),
        (["convert", "a", "b"], "--to is missing: layout to write"),
        (["pretrian"], "there is no command pretrian; is pretrain meant?"),
        (["bench", "thruput", "--rounds", "1"], "there is no command bench thruput; is bench throughput meant?"),
        (["bench", "xyz"], "invalid choice: 'xyz'"),
        (["bench", "info"], "invalid choice: 'info'"),
        (["bench-report", "--rounds", "1"], "there is no command bench-report; is bench report meant?"),
        (["pretrain", "x", "--epohcs", "3"], "is --epochs meant?"),
        (["pretrain", os.curdir, "--epochs", "3"], "unknown arguments: .; is --data . meant?"),
        (["pretrain", "--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
    ],
)
def test_flags_are_taken_whole_and_once(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == str(SPINS)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_every_flag_with_its_default(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    config = COMMANDS[command].config
    for field in fields(load(config)) if config else ():
        help_text = as_flags(field.metadata["help"], [f.name for f in fields(load(config))])
        if not any(field.default is silent for silent in (MISSING, None, True, False)):
            help_text += f" [{field.default}]"
        assert help_text in text
        assert (field.name.upper() if field.metadata["positional"] else flag(field.name)) in text


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
    own.write_bytes(b"holiday")
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "data"), "--overwrite"])
    assert "holds no demo" in capsys.readouterr().err
    assert own.read_bytes() == b"holiday"


def test_drawn_images_are_deterministic_and_labelled(tmp_path):
    assert draw_image(3, (0, 1)).tobytes() == draw_image(3, (0, 1)).tobytes()
    assert draw_image(3, (0, 1)).tobytes() != draw_image(3, (0, 2)).tobytes()
    draw_images(tmp_path / "x", 30, seed=1)
    assert {p.name: len(list(p.iterdir())) for p in (tmp_path / "x").iterdir()} == dict.fromkeys(CLASSES, 3)


@pytest.mark.parametrize("values", [["--value-range", "-9,-12"], ["--mean", "-.5,-2"], ["--nodata", "-9999"]])
def test_values_that_begin_with_a_minus_are_no_flags(tmp_path, capsys, values):
    with pytest.raises(SystemExit):
        main(["pretrain", "--data", str(tmp_path), "--out", str(tmp_path / "x"), *values])
    assert "no image files" in capsys.readouterr().err


def test_torchrun_takes_no_flag_of_a_run_for_its_own():
    """It takes what begins like one of its own, even behind the program. docs/pretraining.md says what helps then."""
    from torch.distributed.run import get_args_parser

    own = {name for action in get_args_parser()._actions for name in action.option_strings}
    flags = {flag(f.name) for kind in (PretrainConfig, FinetuneConfig) for f in fields(kind)}
    assert {name for name in flags if any(other.startswith(name) for other in own)} == {"--monitor"}
