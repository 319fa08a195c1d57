import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import randomise
from PIL import Image
from safetensors.torch import load_file

from sparse_fcmae import UserError, create_classifier, create_encoder, finetune, load_classifier, load_encoder, pretrain
from sparse_fcmae.cli import main
from sparse_fcmae.config import FinetuneConfig
from sparse_fcmae.convert import export_model
from sparse_fcmae.data import AugmentedImages, make_loader, normalise
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.formats.weights import read_weights
from sparse_fcmae.labelled import ClassFolder
from sparse_fcmae.training.augment import OPERATIONS, Mixing, RandAugment
from sparse_fcmae.training.finetune import RECIPE, build
from sparse_fcmae.training.optim import adamw, cosine_lr, layer_scale
from sparse_fcmae.training.recipes import PRESETS, complete

SMALL = {  # 30 of 40 images to train on, 3 steps of 10 an epoch
    **{"val_split": 0.25, "batch_size": 10, "micro_batch_size": 4, "epochs": 3, "lr": 1e-3, "min_crop": 0.5},
    **{"dtype": "fp32", "device": "cpu", "num_workers": 1, "ema_decay": 0.5, "mixup": 0.8, "cutmix": 1.0},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder's folder, as pretraining exports it."""
    folder = tmp_path_factory.mktemp("encoder") / "exported"
    export_model(randomise(create_encoder("atto", image_size=32, stem_stride=1)), folder)
    return folder


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
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def test_run_folder(whole):
    assert {p.name for p in whole.iterdir()} >= {
        *("config.json", "metrics.jsonl", "evaluations.jsonl", "train.log", "loss.png", "accuracy.png"),
        *("checkpoints", "exported", "exported-ema"),
    }
    assert [row["step"] for row in rows(whole)] == list(range(1, 10))
    evaluations = rows(whole, "evaluations")
    assert [row["step"] for row in evaluations] == [3, 6, 9]
    assert evaluations[-1].keys() >= {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"}
    assert "new head for 10 classes" in (whole / "train.log").read_text()


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


def test_it_learns(colours, tmp_path):
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 12, "epochs": 12, "lr": 2e-3, "every": 12}
    options |= {"rand_augment": 0, "random_erasing": 0, "label_smoothing": 0, "ema_decay": 0, "num_workers": 0}
    finetune(data=colours, out=tmp_path / "run", from_scratch=True, **options)
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[0] == pytest.approx(1.0986, abs=0.01)
    assert losses[-1] < 0.3
    assert rows(tmp_path / "run", "evaluations")[0]["top1"] == 1
    assert not (tmp_path / "run" / "exported-ema").exists()


def config(**options):
    return FinetuneConfig(data="x", **options)


def test_loaded_weights_are_not_initialised_again(encoder, tmp_path):
    classes = ("a", "b", "c")
    model, complete_config, notes = build(config(init=str(encoder)), classes)
    state = load_file(encoder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert model.head.weight.abs().max() < 1e-3
    assert any("new head for 3 classes" in note for note in notes)
    assert complete_config.image_size == "32"

    trained = randomise(create_classifier("atto", num_classes=3, image_size=32, stem_stride=1))
    for known, names, kept in ((None, classes, True), (classes, classes, True), (("x", "y", "z"), classes, False)):
        export_model(trained, tmp_path / "c", known)
        model, _, _ = build(config(init=str(tmp_path / "c")), names)
        assert torch.equal(model.head.weight, trained.head.weight) is kept
        assert torch.equal(model.norm.weight, trained.norm.weight)
    model, _, _ = build(config(init=str(tmp_path / "c")), ("a", "b"))
    assert model.head.weight.shape == (2, 320)
    assert torch.equal(model.norm.weight, trained.norm.weight)


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
    assert "20 images of 10 classes, 10 held out" in (tmp_path / "run" / "train.log").read_text()
    assert load_classifier(tmp_path / "run").in_chans == 1


def official_layer(name, depths, grouped):
    """The layer's number as the official code's optim_factory.py has it, which was read for this table."""
    part = name.split(".")
    if part[0] == "downsample_layers":
        return {0: 0, 1: 2, 2: 3, 3: 12}[int(part[1])] if grouped else sum(depths[: int(part[1])]) + 1
    if part[0] == "stages":
        stage, block = int(part[1]), int(part[2])
        if not grouped:
            return sum(depths[:stage]) + block + 1
        return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage]
    return 13 if grouped else sum(depths) + 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["atto", "tiny", "base"])
def test_layer_decay(name, grouped):
    with torch.device("meta"):
        model = create_classifier(name)
    depths = SIZES[name][0]
    scale = layer_scale(0.6, depths, grouped)
    last = 13 if grouped else sum(depths) + 1
    for key, _ in model.named_parameters():
        assert scale(key) == pytest.approx(0.6 ** (last - official_layer(key, depths, grouped)))
    optimizer = adamw(model, 0.1, (0.9, 0.999), scale=scale)
    grouped_parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped_parameters) == len(set(map(id, grouped_parameters))) == len(list(model.parameters()))
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        vector = parameter.ndim == 1 or key.endswith(("gamma", "beta"))
        assert by_id[id(parameter)]["weight_decay"] == (0 if vector else 0.1)
        assert by_id[id(parameter)]["lr_scale"] == scale(key)


def test_presets_fill_what_is_open():
    assert PRESETS.keys() == SIZES.keys() | {"probe"}
    for name in SIZES:
        full = complete(config(from_scratch=True), name)
        assert all(getattr(full, key) == value for key, value in PRESETS[name].items())
    base = complete(config(from_scratch=True, epochs=50, layer_decay=0.9), "base")
    assert (base.warmup_epochs, base.layer_decay, base.layer_decay_type, base.base_lr) == (10, 0.9, "group", 6.25e-4)
    assert complete(config(from_scratch=True, preset="tiny"), "atto").mixup == 0.8
    assert complete(config(init="x", freeze_encoder=True), "atto").rand_augment == 0


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_mixing_shares_labels_as_it_shares_pixels(mixup, cutmix):
    """Plain images, one of each class: their mean gives away the shares."""
    labels = torch.arange(8)
    pixels = (labels * 20).to(torch.uint8)[:, None, None, None].expand(8, 16, 24, 3)
    mix = Mixing(8, random_erasing=0, mixup=mixup, cutmix=cutmix)
    for _ in range(5):
        images, targets = mix(pixels, labels)
        shares = targets @ normalise(pixels)[:, 0, 0, 0]
        torch.testing.assert_close(images[:, 0].mean((1, 2)), shares, atol=1e-5, rtol=1e-5)
        assert ((targets > 0).sum(1) <= 2).all()


def test_erasing_puts_noise_into_boxes():
    mix = Mixing(3, random_erasing=0.5, mixup=0, cutmix=0)
    for channels in (3, 1):
        pixels = torch.full((60, 32, 48, channels), 77, dtype=torch.uint8)
        labels = torch.arange(60) % 3
        torch.manual_seed(1)
        images, same = mix(pixels, labels)
        torch.manual_seed(1)
        assert torch.equal(mix(pixels, labels)[0], images)
        assert same is labels
        changed = (images != normalise(pixels)).any(1).flatten(1).float().mean(1)
        assert 0.3 < (changed > 0).float().mean() < 0.7
        assert changed[changed > 0].min() > 0.01
        assert changed.max() < 0.4
        noise = images[images != normalise(pixels)]
        assert noise.std() == pytest.approx(1, abs=0.1)
    plain, _ = Mixing(3, random_erasing=0, mixup=0, cutmix=0)(pixels, labels)
    assert torch.equal(plain, normalise(pixels))


GREYS = np.tile(np.arange(256, dtype=np.uint8), (256, 1))


def operated(name, m, pixels=GREYS):
    image = Image.fromarray(np.stack([pixels] * 3, -1))
    return np.asarray(OPERATIONS[name][0](image, m)).astype(int)[..., 0]


def test_operations_of_rand_augment_at_the_recipes_magnitude():
    """Against what each does to a value by definition, at magnitude 9 of 10."""
    x = GREYS.astype(int)
    assert np.array_equal(operated("invert", 0.9), 255 - x)
    assert np.array_equal(operated("posterize", 0.9), x & 0x80)
    assert np.array_equal(operated("solarize", 0.9), np.where(x >= 26, 255 - x, x))
    assert np.array_equal(operated("solarize_add", 0.9), np.where(x < 128, np.minimum(255, x + 99), x))
    assert np.abs(operated("brightness", 0.9) - np.minimum(255, x * 1.81)).max() <= 1
    assert np.abs(operated("brightness", -0.9) - x * 0.19).max() <= 1
    assert np.abs(operated("contrast", -0.9) - (128 + (x - 128) * 0.19)).max() <= 1
    assert np.array_equal(operated("color", 0.9), x)
    half = GREYS // 2 + 20
    assert np.abs(operated("auto_contrast", 0.9, half) - (half.astype(int) - 20) * 255 / 127).max() <= 1
    assert np.abs(operated("equalize", 0.9) - x).max() <= 2
    assert (
        np.array_equal(operated("translate_x", 0.9)[:, : 256 - 104], x[:, 104:])
        or np.abs(operated("translate_x", 0.9)[:, :150] - x[:, 104:254]).max() <= 1
    )
    down = operated("translate_y", -0.9, GREYS.T.copy())
    assert np.abs(down[106:, :] - GREYS.T.astype(int)[:150]).max() <= 4
    centre = operated("rotate", 0.9)[128]
    assert np.abs(np.diff(centre[60:196].astype(float)).mean() - np.cos(np.deg2rad(27))) < 0.02
    sheared = operated("shear_x", 0.9)
    assert sheared[100, 100] == pytest.approx(100 + 0.27 * 100, abs=2)


def test_rand_augment_is_seeded_and_varied():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    augment = RandAugment(9)
    for mode in ("RGB", "L"):
        picture = image.convert(mode)
        results = [np.asarray(augment(picture.copy(), np.random.default_rng(i))) for i in range(60)]
        again = np.asarray(augment(picture.copy(), np.random.default_rng(7)))
        assert np.array_equal(again, results[7])
        assert all(result.shape == np.asarray(picture).shape for result in results)
        same = sum(np.array_equal(result, np.asarray(picture)) for result in results)
        assert 5 < same < 35  # each of two operations happens with probability 0.5
        assert len({result.tobytes() for result in results}) > 20


def test_average_is_the_decayed_sum_of_the_weights(pictures, encoder, tmp_path):
    options = {k: v for k, v in SMALL.items() if k not in ("mixup", "cutmix")}
    options |= {"epochs": 1, "save_every": 1, "keep_checkpoints": 9, "ema_decay": 0.7}
    finetune(data=pictures, out=tmp_path / "run", init=encoder, **options)
    steps = [load_file(tmp_path / f"run/checkpoints/step-{i:08d}/model.safetensors") for i in (1, 2, 3)]
    average = load_file(tmp_path / "run" / "exported-ema" / "model.safetensors")
    for key, value in average.items():
        expected = 0.7 * (0.7 * steps[0][key] + 0.3 * steps[1][key]) + 0.3 * steps[2][key]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_cosine_ends_at_the_least_rate():
    assert cosine_lr(9, 10, 5, 1.0, 0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * 0.8)))
    assert cosine_lr(10, 10, 5, 1.0, 0.1) == pytest.approx(0.1)
    assert cosine_lr(2, 10, 5, 1.0, 0.1) == pytest.approx(0.6)
    assert cosine_lr(9, 10, 0, 1e-7, 1e-6) == pytest.approx(1e-7)


def test_run_records_its_recipe_and_needs_its_start_no_more(pictures, encoder, tmp_path):
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(encoder, copy)
    options = {k: v for k, v in SMALL.items() if k != "ema_decay"} | {"epochs": 2, "save_every": 1}
    finetune(data=pictures, out=run, init=copy, **options)
    saved = json.loads((run / "config.json").read_text())
    assert all(saved[name] is not None for name in RECIPE)
    assert (saved["weight_decay"], saved["ema_decay"], saved["image_size"]) == (0.3, 0.9999, "32")
    assert "--weight-decay 0.3" in (run / "train.log").read_text()
    shutil.rmtree(copy)
    (run / "checkpoints" / "latest").write_text("step-00000005\n")
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
    assert "unknown preset" in fails(preset="giant")
    assert "must be at most 10" in fails(rand_augment=11)
    assert "--ema-decay 1.0 must be less than 1" in fails(ema_decay=1)
    assert "unknown model 'attto'" in fails("--from-scratch", init=None, model="attto")
    assert "lies among the class folders" in fails(out=pictures / "run")
    assert "which --overwrite deletes" in fails("--overwrite", init=whole / "exported-ema", out=whole)
    assert "--labels-per-class 9" in fails(labels_per_class=9)
    assert "not a multiple of the 8-pixel patch" in fails(image_size=33)
    assert "holds a run: give --resume to go on or --overwrite" in fails(out=whole)
    assert "--lr is 0.5 but the run in" in fails("--resume", out=whole, lr=0.5)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    assert "pip install kornia (the extra finetune)" in fails()
    with pytest.raises(TypeError, match="unexpected option"):
        finetune(dat=pictures)


def test_pretraining_goes_on_from_weights_and_looks_at_neighbours(pictures, encoder, tmp_path):
    small = {"model": "atto", "image_size": 32, "stem_stride": 1, "batch_size": 10, "dtype": "fp32", "num_workers": 0}
    data = tmp_path / "labelled"
    for split in ("train", "val"):
        for folder in pictures.iterdir():
            (data / split / folder.name).mkdir(parents=True)
            first = sorted(folder.iterdir())[split == "val"]
            (data / split / folder.name / first.name).symlink_to(first)
    run = tmp_path / "run"
    pretrain(data=pictures, out=run, init=encoder, knn=data, every=1, epochs=2, lr=1e-9, **small)
    assert [row["step"] for row in rows(run, "evaluations")] == [0, 4, 8]
    assert all(0 <= row["knn_top1"] <= 1 for row in rows(run, "evaluations"))
    assert "new decoder" in (run / "train.log").read_text()
    state, after = load_file(encoder / "model.safetensors"), load_file(run / "exported" / "model.safetensors")
    assert all((after[key] - value).abs().max() < 1e-6 for key, value in state.items())

    again = tmp_path / "again"
    pretrain(data=pictures, out=again, init=run, epochs=1, lr=1e-9, batch_size=10, dtype="fp32", num_workers=0)
    assert "going on from the encoder and decoder" in (again / "train.log").read_text()
    models = [load_file(r / "checkpoints" / f"step-{s:08d}" / "model.safetensors") for r, s in ((run, 8), (again, 4))]
    assert all((models[1][key] - value).abs().max() < 1e-6 for key, value in models[0].items())
    for options, message in (({"model": "femto"}, "give --model atto"), ({"stem_stride": 2}, "give --stem-stride 1")):
        with pytest.raises(UserError, match=message):
            pretrain(data=pictures, out=tmp_path / "x", init=encoder, epochs=1, **small | {"image_size": 64} | options)
    with pytest.raises(UserError, match="has no folder train"):
        pretrain(data=pictures, out=tmp_path / "x", knn=pictures, epochs=1, **small)
    assert not (tmp_path / "x").exists()


def test_labels_follow_images_that_replace_unreadable_ones(tmp_path):
    """Every class has a colour, so that a wrong label shows: the labels that were trained on fit the pixels."""
    for label, name in enumerate(("dark", "light")):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (200 * label,) * 3).save(tmp_path / name / f"{i}.png")
    (tmp_path / "dark" / "0.png").write_text("no picture")
    folder = ClassFolder(tmp_path)
    dataset = AugmentedImages(folder, (16, 16), 3, 0)
    for epoch in range(5):
        (batch,) = make_loader(dataset, [[(epoch, i) for i in range(8)]], 0, False)
        assert len(batch.bad) >= 1
        assert torch.equal((batch.pixels.flatten(1).float().mean(1) > 100).long(), folder.labels[batch.index])
