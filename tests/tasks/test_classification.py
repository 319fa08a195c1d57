import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from helpers import OF_MACHINE, go_back
from safetensors.torch import load_file
from torch import nn

from sparse_fcmae import UserError, evaluate, finetune, load_classifier, load_encoder
from sparse_fcmae.cli import main
from sparse_fcmae.report.page import in_page
from sparse_fcmae.report.record import RunReader
from sparse_fcmae.tasks.classification import ClassificationObjective, CrossEntropy, balanced_weights, said_of
from sparse_fcmae.tasks.recipes import TOLD
from sparse_fcmae.weights.read import read_weights

SMALL = {  # 30 of 40 images to train on, 3 steps of 10 an epoch
    "val_split": 0.25,
    "batch_size": 10,
    "micro_batch_size": 4,
    "epochs": 3,
    "lr": 1e-3,
    "min_crop": 0.5,
    "dtype": "fp32",
    "device": "cpu",
    "num_workers": 1,
    "ema_decay": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}


@pytest.fixture(scope="module")
def whole(pictures, encoder, tmp_path_factory):
    """An uninterrupted run with everything on."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finetune(data=pictures, out=run, init=encoder, **SMALL)
    return run


def command(pictures, encoder, out, *extra, **options):
    given = {"data": pictures, "out": out, "init": encoder, **SMALL, **options}
    flags = [part for k, v in given.items() for part in ("--" + k.replace("_", "-"), str(v))]
    return [sys.executable, "-m", "sparse_fcmae", "finetune", *flags, *extra]


def rows(run, name="metrics"):
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_MACHINE} for row in found]


def test_run_folder(whole):
    assert {p.name for p in whole.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "train.log",
        "loss.png",
        "accuracy.png",
        "checkpoints",
        "exported",
        "exported-ema",
        "evaluation",
    }
    assert [row["step"] for row in rows(whole)] == list(range(1, 10))
    evaluations = rows(whole, "evaluations")
    assert [row["step"] for row in evaluations] == [3, 6, 9]
    assert evaluations[-1].keys() >= {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"}
    assert "new head for 10 classes" in (whole / "train.log").read_text()


def test_what_it_says_of_held_out_images_is_what_evaluate_finds(whole, pictures, tmp_path):
    options = {"val_split": 0.25, "dtype": "fp32", "device": "cpu", "out": str(tmp_path / "found")}
    found = evaluate(data=str(pictures), init=str(whole), **options)
    saved = json.loads((whole / "evaluation" / "evaluation.json").read_text())
    assert {name: found[name] for name in saved if name not in ("weights", "data")} == {
        name: value for name, value in saved.items() if name not in ("weights", "data")
    }
    assert json.loads((whole / "evaluation" / "confusion.json").read_text()) == found["confusion"]
    assert (whole / "evaluation" / "mistakes.png").read_bytes() == (tmp_path / "found" / "mistakes.png").read_bytes()
    record = RunReader(whole, in_page).read()
    assert record["evaluation"]["confusion"]["classes"] == found["confusion"]["classes"]
    assert [picture["name"] for picture in record["evaluation"]["pictures"]] == ["mistakes"]
    assert record["verdict"] is None
    assert [chart["name"] for chart in record["charts"]][:2] == ["loss", "top1"]


def test_an_evaluation_on_other_images_stays(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    other = run / "evaluation" / "evaluation.json"
    other.write_text(json.dumps({"data": "others", "images": 3}))
    shutil.rmtree(run / "exported")
    finetune(out=run, resume=True)
    assert json.loads(other.read_text()) == {"data": "others", "images": 3}
    assert "has an evaluation on others, and stays as it is" in (run / "train.log").read_text()


def test_a_checkpoint_by_itself_is_read_whole(whole, pictures):
    weights = read_weights(whole / "checkpoints" / "step-00000009")
    assert weights.architecture["image_size"] == (32, 32)
    assert weights.classes == tuple(sorted(p.name for p in pictures.iterdir()))


def test_export_is_the_trained_classifier_and_its_average(whole, pictures, capsys):
    model = load_classifier(whole)
    trained = load_file(whole / "checkpoints" / "step-00000009" / "model.safetensors")
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())
    average = load_classifier(whole / "exported-ema").state_dict()
    assert not torch.equal(average["head.weight"], trained["head.weight"])
    config = json.loads((whole / "exported" / "config.json").read_text())
    assert config["classes"] == sorted(p.name for p in pictures.iterdir())
    assert load_encoder(whole).image_size == (32, 32)
    main(["evaluate", "--init", str(whole), "--data", str(pictures)])
    assert "40 images" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_killed_and_resumed_run_ends_with_the_same_weights(pictures, encoder, whole, tmp_path, steps):
    run = tmp_path / "run"
    arguments = command(pictures, encoder, run, log_every=1, save_every=2)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and (run / "metrics.jsonl").read_text().count("\n") < steps:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*arguments, "--resume"], check=True, capture_output=True)
    assert rows(run) == rows(whole)
    assert rows(run, "evaluations") == rows(whole, "evaluations")
    for folder in ("exported", "exported-ema"):
        a, b = (load_file(r / folder / "model.safetensors") for r in (run, whole))
        assert all(torch.equal(a[key], value) for key, value in b.items())


def test_two_ranks_give_one_ranks_losses(pictures, encoder, tmp_path, monkeypatch):
    """With everything on: what is drawn follows from a micro-batch's place in the global batch."""
    options = {"micro_batch_size": 5, "epochs": 2}
    finetune(data=pictures, out=tmp_path / "one", init=encoder, **SMALL | options)
    arguments = command(pictures, encoder, tmp_path / "two", **options)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments[1:]]
    subprocess.run(torchrun, check=True, capture_output=True)
    for name in ("metrics", "evaluations"):
        for one, two in zip(rows(tmp_path / "one", name), rows(tmp_path / "two", name), strict=True):
            assert two == pytest.approx(one, rel=1e-4)
    one, two = (json.loads((tmp_path / run / "evaluation" / "evaluation.json").read_text()) for run in ("one", "two"))
    assert {**two, "weights": one["weights"]} == one


@pytest.mark.usefixtures("rehearsed")
def test_a_rehearsal_leaves_no_trace(pictures, encoder, whole, tmp_path):
    finetune(data=pictures, out=tmp_path / "run", init=encoder, **SMALL)
    assert rows(tmp_path / "run") == rows(whole)


def test_the_best_is_exported_with_its_moving_average(pictures, encoder, tmp_path):
    run, options = tmp_path / "run", SMALL | {"monitor": "ema_loss", "patience": 1, "lr": 1.0, "epochs": 9}
    finetune(data=pictures, out=run, init=encoder, **options)
    found = [row["ema_loss"] for row in rows(run, "evaluations")]
    best = min(range(len(found)), key=found.__getitem__)
    assert len(found) == best + 2 < 9  # one came after it
    kept = run / "checkpoints" / f"step-{3 * (best + 1):08d}"
    state = torch.load(kept / "trainer.pt", weights_only=True)["ema"]
    average = load_file(run / "exported-ema" / "model.safetensors")
    assert all(torch.equal(state[f"module.{key}"], value) for key, value in average.items())
    with pytest.raises(
        UserError, match="`monitor` top3 is not measured in this run: choose top1 or top5 or balanced_accuracy or loss"
    ):
        finetune(data=pictures, out=tmp_path / "none", init=encoder, **options | {"monitor": "top3"})
    assert not (tmp_path / "none").exists()


def test_it_learns(colours, tmp_path):
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 12, "epochs": 12, "lr": 2e-3, "eval_every": 12}
    options |= {"rand_augment": 0, "random_erasing": 0, "label_smoothing": 0, "ema_decay": 0, "num_workers": 0}
    finetune(data=colours, out=tmp_path / "run", from_scratch=True, **options)
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[0] == pytest.approx(1.0986, abs=0.01)
    assert losses[-1] < 0.3
    assert rows(tmp_path / "run", "evaluations")[0]["top1"] == 1
    assert not (tmp_path / "run" / "exported-ema").exists()


def test_frozen_encoder_stays_and_its_head_learns(pictures, encoder, tmp_path):
    options = {k: v for k, v in SMALL.items() if k not in ("ema_decay", "mixup", "cutmix")}
    finetune(data=pictures, out=tmp_path / "run", init=encoder, freeze_encoder=True, **options)
    before, after = (load_file(f / "model.safetensors") for f in (encoder, tmp_path / "run" / "exported"))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert after["head.bias"].abs().max() > 0
    assert not torch.equal(after["norm.weight"], torch.ones(320))


def test_few_labels_grey_and_from_scratch(pictures, tmp_path):
    options = SMALL | {"epochs": 1, "batch_size": 20, "image_size": 32, "stem_stride": 1, "in_chans": 1}
    finetune(data=pictures, out=tmp_path / "run", from_scratch=True, labels_per_class=2, **options)
    assert "10 classes, 10 images held out; 20 samples" in (tmp_path / "run" / "train.log").read_text()
    assert load_classifier(tmp_path / "run").in_chans == 1


def test_rare_classes_count_as_much_as_frequent_ones(colours, tmp_path):
    for number, image in enumerate(sorted((colours / "train").rglob("*.png"))):
        if image.parent.name != "red" or number % 2:
            (tmp_path / "data" / "train" / image.parent.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / "train" / image.parent.name / image.name).symlink_to(image)
    (tmp_path / "data" / "val").symlink_to(colours / "val")
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 4, "epochs": 1, "num_workers": 0, "ema_decay": 0}
    run = tmp_path / "run"
    finetune(data=tmp_path / "data", out=run, from_scratch=True, class_weights="balanced", **options)
    assert 0 <= rows(run, "evaluations")[-1]["balanced_accuracy"] <= 1
    counts = [6, 3, 1]
    weights = balanced_weights(counts)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    logits, labels = torch.randn(10, 3), torch.tensor([0] * 6 + [1] * 3 + [2])
    mix = lambda pixels, labels: (pixels, labels)  # noqa: E731
    each = F.cross_entropy(logits, labels, label_smoothing=0.0, reduction="none")
    plain = ClassificationObjective(nn.Identity(), mix, CrossEntropy(0.0, weights))(logits, labels)
    by_class = [each[labels == label].mean() for label in range(3)]
    assert plain.item() == pytest.approx(torch.stack(by_class).mean().item(), rel=1e-6)
    smoothed = CrossEntropy(0.1, weights)
    mixed = smoothed(logits, F.one_hot(labels, 3).float())
    assert mixed.item() == pytest.approx(smoothed(logits, labels).item(), rel=1e-6)


def test_smoothing_does_not_make_rare_classes_win():
    labels = torch.tensor([0] * 99 + [1])
    loss, table = CrossEntropy(0.2, balanced_weights([99, 1])), torch.zeros(2, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=200)

    def closure():
        optimizer.zero_grad()
        value = loss(table[labels], labels)
        value.backward()
        return value

    optimizer.step(closure)
    assert table.softmax(1).diagonal().tolist() == pytest.approx([0.9, 0.9], abs=0.01)


def test_average_is_the_decayed_sum_of_the_weights(pictures, encoder, tmp_path):
    options = {k: v for k, v in SMALL.items() if k not in ("mixup", "cutmix")}
    options |= {"epochs": 1, "save_every": 1, "keep_checkpoints": 9, "ema_decay": 0.7}
    finetune(data=pictures, out=tmp_path / "run", init=encoder, **options)
    steps = [load_file(tmp_path / f"run/checkpoints/step-{i:08d}/model.safetensors") for i in (1, 2, 3)]
    average = load_file(tmp_path / "run" / "exported-ema" / "model.safetensors")
    for key, value in average.items():
        expected = 0.7 * (0.7 * steps[0][key] + 0.3 * steps[1][key]) + 0.3 * steps[2][key]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_run_records_its_recipe_and_needs_its_start_no_more(pictures, encoder, tmp_path):
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(encoder, copy)
    options = {k: v for k, v in SMALL.items() if k != "ema_decay"} | {"epochs": 2, "save_every": 1}
    finetune(data=pictures, out=run, init=copy, **options)
    saved = json.loads((run / "config.json").read_text())
    assert all(saved[name] is not None for name in TOLD if name != "base_lr")
    assert (saved["weight_decay"], saved["ema_decay"], saved["image_size"]) == (0.3, 0.9999, "32")
    assert "--weight-decay 0.3" in (run / "train.log").read_text()
    shutil.rmtree(copy)
    go_back(run, 5)
    before = load_file(run / "exported" / "model.safetensors")
    finetune(out=run, resume=True)
    after = load_file(run / "exported" / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_mistakes_are_one_line(pictures, encoder, whole, tmp_path, capsys, monkeypatch):
    def fails(*arguments, **options):
        flags = {"data": pictures, "out": tmp_path / "new", "init": encoder, **SMALL, **options}
        parts = [part for k, v in flags.items() if v is not None for part in ("--" + k.replace("_", "-"), str(v))]
        with pytest.raises(SystemExit) as stop:
            main(["finetune", *parts, *arguments])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "new").exists()
        return error

    assert "give --init with the weights to fine-tune, or --from-scratch" in fails(init=None)
    assert "give --init with the weights to fine-tune, or --from-scratch" in fails("--from-scratch")
    assert "has no folder train" in fails(val_split=None)
    assert "no such file or folder" in fails(init=tmp_path / "none")
    assert "choose 30 or less" in fails(batch_size=64)
    assert "--model goes with --from-scratch alone" in fails(model="tiny")
    assert "invalid choice: 'enormous'" in fails(preset="enormous")
    assert "--rand-augment must be at most 10" in fails(rand_augment=11)
    assert "--ema-decay must be less than 1, not 1.0" in fails(ema_decay=1)
    assert "invalid choice: 'attto'" in fails("--from-scratch", init=None, model="attto")
    assert "lies among the class folders" in fails(out=pictures / "run")
    assert "which --overwrite deletes" in fails("--overwrite", init=whole / "exported-ema", out=whole)
    assert "--labels-per-class 9" in fails(labels_per_class=9)
    assert "not a multiple of the 8-pixel patch" in fails(image_size=33)
    assert "holds a run: give --resume to go on or --overwrite" in fails(out=whole)
    assert "--mixup is 0.5 but the run in" in fails("--resume", out=whole, mixup=0.5)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    assert "pip install kornia (the extra finetune)" in fails()
    with pytest.raises(TypeError, match="unexpected keyword argument 'dat'"):
        finetune(dat=pictures)


@pytest.mark.parametrize(
    ("task", "classes", "hint"),
    [
        ("classification", ("images", "masks"), "--task segmentation"),
        ("classification", ("cat", "cat;dog"), "--task multilabel"),
        ("classification", ("cat", "dog"), None),
        ("multilabel", ("cat", "dog"), None),
    ],
)
def test_the_log_names_classes_and_what_they_look_like(task, classes, hint):
    names, *hints = said_of(task, classes)
    assert names.endswith(": " + ", ".join(classes))
    assert [hint in line for line in hints] == ([True] if hint else [])
