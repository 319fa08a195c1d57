"""Wrong options of the benchmarks."""

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks.compare import compare
from sparse_fcmae.benchmarks.report import report
from sparse_fcmae.benchmarks.scaling import scaling
from sparse_fcmae.benchmarks.throughput import throughput
from sparse_fcmae.cli import main


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("throughput --backend fast", "unknown backend 'fast'"),
        ("throughput --model atto,giga", "unknown model 'giga'"),
        ("throughput --work step,nothing", "unknown work 'nothing'"),
        ("throughput --dtype fp8", "unknown dtype 'fp8'"),
        ("throughput --batch-size 0", "--batch-size must be from 1 to 16384, or max, not 0"),
        ("throughput --batch-size 99999999999999999999", "--batch-size must be from 1 to 16384, or max"),
        ("throughput --seed -1", "--seed must be at least 0"),
        ("throughput --seed 99999999999999999999999", "--seed must be less than"),
        ("throughput --json same.rows --csv same.rows", "--json and --csv can't be the same file"),
        ("compare --batch-size 99999999999999999999", "--batch-size must be at most"),
        ("kernels --rounds 0", "--rounds must be greater than 0"),
        ("report --seed -1", "--seed must be at least 0"),
        ("report --data /nowhere", "/nowhere: no such folder"),
        ("scaling --over threads --values 100000", "threads at most"),
        ("scaling --over model --values giga", "unknown model 'giga'"),
        ("throughput --batch-size many", "--batch-size many: give numbers"),
        ("throughput --mask-ratio 1.5", "--mask-ratio 1.5 is not a fraction"),
        ("throughput --mask-ratio 0", "pretraining needs masks: give a --mask-ratio greater than 0, or --work forward"),
        ("throughput --image-size 100", "not a multiple of the 32-pixel patch"),
        ("throughput --rounds 0", "--rounds must be greater than 0"),
        ("throughput --json /nowhere/rows.json", "can't write /nowhere/rows.json"),
        ("throughput --device tpu", "--device tpu can't be used"),
        ("throughput --backends native", "unknown arguments: --backends native"),
        ("throughput --backend minkowski --dtype bf16", "MinkowskiEngine"),
        ("scaling --backend minkowski --dtype bf16", "MinkowskiEngine"),
        ("data", "--data is missing"),
        ("pretrain", "--data is missing"),
        ("pretrain --data /nowhere", "/nowhere: no such folder"),
        ("pretrain --steps 0", "--steps must be greater than 0"),
        ("scaling --over time", "invalid choice: 'time'"),
        ("scaling --over threads --values 0", "--values must be from 1"),
        ("scaling --values 0.5,0.99", "keeps no patch"),
        ("scaling --png /nowhere/x.png", "can't write /nowhere/x.png"),
        ("kernels --model nano2", "unknown model 'nano2'"),
        ("gflops --compare mvit", "give timm:NAME@PIXELS"),
        ("gflops --compare timm:nonsense@224", "Unknown model"),
        ("report --model giga", "unknown model 'giga'"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, command, message):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *command.split()])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        (throughput, {"batch_size": 0}, "`batch_size` must be from 1"),
        (throughput, {"mask_ratio": 0}, "give a `mask_ratio` greater than 0, or `work=forward,step`"),
        (scaling, {"over": "time"}, "`over` time: choose one of mask-ratio"),
        (scaling, {"over": "threads", "values": "0"}, "`values` must be from 1"),
        (compare, {"task": "pretrain", "drop_path": 0.1}, "`drop_path` is of `task=finetune`"),
        (report, {"rounds": 0}, "`rounds` must be greater than 0"),
    ],
)
def test_an_error_in_python_names_the_argument(benchmark, options, message):
    with pytest.raises(UserError, match=message):
        benchmark(**options)


def test_an_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="images_size"):
        throughput(images_size=64)
