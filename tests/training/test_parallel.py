"""Runs of several processes, each with the whole model or with a shard, against a run of one process."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import OF_MACHINE, flip_bytes, go_back
from safetensors.torch import load_file

from sparse_fcmae import UserError, load_encoder, pretrain
from sparse_fcmae.runtime.checkpoint_folder import damage
from sparse_fcmae.weights.read import read_weights

SMALL = {  # 40 images, 5 steps of 8 an epoch; their mean loss changes in the seventh digit with the order of sums
    "model": "atto",
    "image_size": 32,
    "stem_stride": 1,
    "decoder_dim": 64,
    "batch_size": 8,
    "epochs": 10,
    "lr": 1e-3,
    "save_every": 20,
    "dtype": "fp32",
    "device": "cpu",
    "num_workers": 0,
}
TUNED = {
    "image_size": 32,
    "val_split": 0.3,
    "batch_size": 8,
    "micro_batch_size": 2,
    "epochs": 2,
    "lr": 1e-3,
    "mixup": 0.8,
    "drop_path": 0.2,
    "ema_decay": 0.5,
    "dtype": "fp32",
    "device": "cpu",
    "num_workers": 0,
}
PROGRAM = """
import json
import sys
from sparse_fcmae import UserError, finetune, pretrain
from sparse_fcmae.runtime.distributed import end_process, process_group

with process_group("cpu") as ranks:
    for kind, options in json.loads(sys.argv[1]):
        try:
            {"pretrain": pretrain, "finetune": finetune}[kind](**options)
        except UserError as error:
            if ranks.main:
                print("refused:", error)
end_process(0)
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Has several processes do runs, given as ("pretrain" or "finetune", options), one run after the other."""
    program = tmp_path_factory.mktemp("program") / "program.py"
    program.write_text(PROGRAM)

    def run(processes, *runs, machines=1):
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        per_machine = ["--nproc-per-node", str(processes // machines)]
        meeting = ["--standalone"]
        if machines > 1:
            meeting = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-id", "x"]
            meeting += ["--rdzv-endpoint", "localhost:29431"]
        command = [*torchrun, *meeting, *per_machine, str(program), json.dumps(runs, default=str)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            for _ in range(machines)
        ]
        ended = [process.communicate() for process in started]
        assert all(process.returncode == 0 for process in started), ended
        assert not any("Warning" in errors for _, errors in ended), ended
        return "".join(output for output, _ in ended)

    return run


def rows(run, name="metrics"):
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_MACHINE} for row in found]


def losses(run):
    return [row["loss"] for row in rows(run)]


def exported(run, folder="exported"):
    return (run / folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def labelled(colours, tmp_path_factory):
    """A folder with train and val, of which two ranks have batches of unequal number, and one unreadable image."""
    folder = tmp_path_factory.mktemp("labelled") / "images"
    shutil.copytree(colours, folder)
    for name in ("one.png", "more.png"):
        shutil.copy(next((folder / "val" / "red").iterdir()), folder / "val" / "red" / name)
    (folder / "val" / "green" / "broken.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def runs(pictures, labelled, launch, tmp_path_factory):
    """A folder with the same 50 steps by one process, and by two in each way; and what these printed."""
    root = tmp_path_factory.mktemp("runs")
    options = {"data": pictures, **SMALL, "knn": labelled, "eval_every": 10}
    pretrain(out=root / "one", **options)
    launch(
        2,
        ("pretrain", options | {"out": root / "ddp"}),
        ("pretrain", options | {"out": root / "fsdp", "parallel": "fsdp"}),
        ("pretrain", options | {"out": root / "micro", "parallel": "hsdp", "micro_batch_size": 1, "epochs": 2}),
        ("pretrain", options | {"out": root / "again", "parallel": "fsdp", "grad_checkpointing": True, "epochs": 2}),
        ("pretrain", options | {"out": root / "bf16", "dtype": "bf16", "epochs": 2}),
        ("pretrain", options | {"out": root / "bf16-fsdp", "dtype": "bf16", "parallel": "fsdp", "epochs": 2}),
        ("pretrain", options | {"out": root / "torch", "parallel": "fsdp", "backend": "torch", "epochs": 2}),
    )
    return root


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_ranks_go_through_the_losses_of_one(runs, way):
    assert len(losses(runs / "one")) == 50
    assert losses(runs / way) == pytest.approx(losses(runs / "one"), abs=1e-5)
    for two, one in zip(rows(runs / way), rows(runs / "one"), strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert rows(runs / way, "evaluations") == rows(runs / "one", "evaluations")


def test_micro_batches_checkpointed_gradients_and_another_backend_change_rounding_at_most(pictures, runs, tmp_path):
    pretrain(data=pictures, out=tmp_path / "one", **SMALL | {"epochs": 2})
    for way in ("micro", "again", "torch"):
        assert losses(runs / way) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_shards_in_bfloat16_train_as_copies_do(runs):
    assert losses(runs / "bf16-fsdp") == pytest.approx(losses(runs / "bf16"), rel=1e-3)


def test_a_sharded_checkpoint_has_no_whole_model_and_is_read_as_any_other(runs):
    folder = runs / "fsdp" / "checkpoints" / "step-00000050"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    shards = [f"shards/shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    assert names == ["meta.json", *shards, "trainer.pt"]
    assert set(json.loads((folder / "meta.json").read_text())["sha256"]) == {*shards, "trainer.pt"}
    sizes = [(folder / name).stat().st_size for name in shards]
    whole = (runs / "ddp" / "checkpoints" / "step-00000050" / "model.safetensors").stat().st_size
    assert max(sizes) < 1.8 * whole  # half of the weights and of their two moments, and the small ones that stay whole
    weights = read_weights(folder)
    assert weights.has_decoder
    final = load_file(runs / "fsdp" / "exported" / "model.safetensors")
    encoder = load_encoder(folder).state_dict()
    assert all(torch.equal(encoder[name], tensor) for name, tensor in final.items())


def go_on(launch, tmp_path, *cases, back_to=None):
    """Copies of runs, each given as (source, processes, way), which these processes go on with in that way."""
    found, of_two = [], []
    for source, processes, way in cases:
        run = tmp_path / f"{source.name}-{processes}-{way}"
        shutil.copytree(source, run)
        shutil.rmtree(run / "exported")
        if back_to:
            go_back(run, back_to)
        options = {"out": run, "resume": True, "parallel": way}
        pretrain(**options) if processes == 1 else of_two.append(("pretrain", options))
        found.append(run)
    launch(2, *of_two)
    return found


def test_what_is_exported_of_a_checkpoint_is_the_same_whoever_reads_it(runs, launch, tmp_path):
    fsdp, ddp = runs / "fsdp", runs / "ddp"
    cases = ((fsdp, 1, "fsdp"), (fsdp, 2, "ddp"), (fsdp, 2, "fsdp"), (ddp, 2, "fsdp"), (ddp, 1, "ddp"))
    for (source, *_), run in zip(cases, go_on(launch, tmp_path, *cases), strict=True):
        assert exported(run) == exported(source)


def test_a_run_goes_on_with_other_processes_in_another_way(runs, launch, tmp_path):
    one, fsdp, ddp = runs / "one", runs / "fsdp", runs / "ddp"
    cases = ((fsdp, 2, "fsdp"), (fsdp, 1, "ddp"), (fsdp, 2, "ddp"), (ddp, 2, "fsdp"), (one, 2, "fsdp"))
    same, *others = go_on(launch, tmp_path, *cases, back_to=20)
    assert losses(same) == losses(fsdp)
    assert exported(same) == exported(fsdp)
    for run in others:
        assert losses(run) == pytest.approx(losses(one), abs=1e-5)


def test_a_damaged_shard_is_left_out_and_named(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "fsdp", run)
    newest = run / "checkpoints" / "step-00000050"
    shard = newest / "shards" / "shard-00002-model-00001-of-00001.safetensors"
    flip_bytes(shard)
    assert damage(newest) == f"shards/{shard.name} has other bytes than were written"
    shard.unlink()
    assert damage(newest) == f"shards/{shard.name}: No such file or directory"
    with pytest.raises(UserError, match=r"is damaged: shards/.*: take another"):
        read_weights(newest)
    pretrain(out=run, resume=True)
    assert f"checkpoint {newest} is damaged and left out" in (run / "train.log").read_text()
    assert losses(run) == pytest.approx(losses(runs / "one"), abs=1e-5)


def test_fine_tuning_in_shards(pictures, runs, launch, tmp_path):
    """With a moving average and stochastic depth, and with a frozen encoder."""
    options = {"data": pictures, "init": runs / "one" / "exported", **TUNED}
    frozen = options | {"freeze_encoder": True, "preset": "probe", "drop_path": 0}
    launch(
        2,
        ("finetune", options | {"out": tmp_path / "ddp"}),
        ("finetune", options | {"out": tmp_path / "fsdp", "parallel": "fsdp"}),
        ("finetune", frozen | {"out": tmp_path / "frozen-ddp"}),
        ("finetune", frozen | {"out": tmp_path / "frozen-fsdp", "parallel": "fsdp"}),
    )
    for kind in ("", "frozen-"):
        for name in ("metrics", "evaluations"):
            for a, b in zip(rows(tmp_path / f"{kind}fsdp", name), rows(tmp_path / f"{kind}ddp", name), strict=True):
                assert a == pytest.approx(b, rel=1e-3)
    for folder in ("exported", "exported-ema"):
        a, b = (load_file(tmp_path / way / folder / "model.safetensors") for way in ("fsdp", "ddp"))
        assert all(torch.allclose(a[name], tensor, atol=1e-4) for name, tensor in b.items())


def test_what_does_not_fit_is_one_line(pictures, launch, tmp_path):
    options = {"data": pictures, "out": tmp_path / "run", **SMALL, "parallel": "fsdp"}
    output = launch(
        2,
        ("pretrain", options | {"compile": True}),
        ("pretrain", options | {"cpu_offload": True}),
        ("pretrain", options | {"batch_size": 7}),
    )
    first, second, third = re.findall(r"refused: (.*)", output)
    assert first == "`compile` can't look into a model in shards: leave it out"
    assert second == "`cpu_offload` goes with `parallel=fsdp` or `parallel=hsdp` on several GPUs: leave it out"
    assert third == "`batch_size` 7 can't be divided evenly among 2 processes: choose 8"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_four_ranks_and_two_machines(pictures, labelled, runs, launch, tmp_path):
    """Two machines are two launchers, as each machine has one."""
    options = {"data": pictures, **SMALL, "knn": labelled, "eval_every": 10}
    ways = ("ddp", "fsdp")
    launch(4, *(("pretrain", options | {"out": tmp_path / way, "parallel": way}) for way in ways))
    hsdp = options | {"out": tmp_path / "hsdp", "parallel": "hsdp", "micro_batch_size": 1}
    launch(4, ("pretrain", hsdp), machines=2)
    for way in (*ways, "hsdp"):
        assert losses(tmp_path / way) == pytest.approx(losses(runs / "one"), abs=1e-5)
        assert rows(tmp_path / way, "evaluations") == rows(runs / "one", "evaluations")
    for source, processes, way in (
        (tmp_path / "hsdp", 2, "fsdp"),
        (runs / "fsdp", 4, "fsdp"),
        (tmp_path / "fsdp", 2, "ddp"),
    ):
        run = tmp_path / f"{source.name}-{processes}-{way}"
        shutil.copytree(source, run)
        go_back(run, 20)
        launch(processes, ("pretrain", {"out": run, "resume": True, "parallel": way}))
        assert losses(run) == pytest.approx(losses(runs / "one"), abs=1e-5)
