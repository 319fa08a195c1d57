"""Segmentation as its user runs it: learning, resuming, windows, and mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import OF_MACHINE, fails, go_back
from PIL import Image
from safetensors.torch import load_file

from sparse_fcmae import evaluate, finetune, predict
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.masks import MaskClasses
from sparse_fcmae.data.sources.masked import Pair
from sparse_fcmae.data.views import NativeView, RandomView
from sparse_fcmae.model.segmenter import Segmenter
from sparse_fcmae.tasks.build import moving_average
from sparse_fcmae.tasks.segmentation import AUXILIARY, PairView, SegmentationObjective
from sparse_fcmae.training.optim import adamw
from sparse_fcmae.training.step import TrainStep

SMALL = {
    "task": "segmentation",
    "head_channels": 8,
    "batch_size": 4,
    "epochs": 2,
    "lr": 1e-3,
    "num_workers": 0,
    "dtype": "fp32",
    "ema_decay": 0.5,
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Images with bright squares, and masks of these: 8 to train on, 4 held out, of odd sizes."""
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            width, height = rng.integers(40, 70, 2)
            image, mask = rng.integers(0, 80, (height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
            left, top = int(rng.integers(0, width - 16)), int(rng.integers(0, height - 16))
            image[top : top + 16, left : left + 16] = (250, 240, 60)
            mask[top : top + 16, left : left + 16] = 3
            mask[0, 0] = 255
            for name, values in (("images", image), ("masks", mask)):
                (root / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / split / name / f"{number}.png")
    return root


def rows(run, name="metrics"):
    found = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_MACHINE} for row in found]


@pytest.fixture(scope="module")
def whole(squares, encoder, tmp_path_factory):
    run = tmp_path_factory.mktemp("segmentation") / "run"
    finetune(data=squares, out=run, init=encoder, save_every=2, keep_checkpoints=9, class_names="none,square", **SMALL)
    return run


def test_run_folder(whole):
    assert {p.name for p in whole.iterdir()} >= {"loss.png", "miou.png", "exported", "exported-ema", "segmentations"}
    assert [row["step"] for row in rows(whole, "evaluations")] == [2, 4]
    assert rows(whole, "evaluations")[0].keys() >= {"miou", "pixel_accuracy", "mean_accuracy", "ema_miou"}
    saved = json.loads((whole / "config.json").read_text())
    assert (saved["mask_values"], saved["classes"], saved["ignored"]) == ([0, 3], ["none", "square"], [255])
    assert "fine-tuned for segmentation" in (whole / "exported" / "README.md").read_text()


def test_evaluate_says_what_the_run_said(whole, squares):
    found = evaluate(data=str(squares), init=str(whole), num_workers=0, dtype="fp32")
    assert found["miou"] == pytest.approx(rows(whole, "evaluations")[-1]["miou"])
    found = evaluate(data=str(squares), init=str(whole / "exported-ema"), num_workers=0, dtype="fp32")
    assert found["miou"] == pytest.approx(rows(whole, "evaluations")[-1]["ema_miou"])


def test_it_goes_on_exactly(whole, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(whole, again)
    go_back(again, 2)
    shutil.rmtree(again / "exported")
    finetune(out=again, resume=True)
    before, after = (load_file(run / "exported" / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert rows(again, "evaluations") == rows(whole, "evaluations")


def test_a_rehearsal_leaves_no_trace(whole, squares, encoder, tmp_path, rehearsed):
    finetune(data=squares, out=tmp_path / "run", init=encoder, class_names="none,square", **SMALL)
    before, after = (load_file(run / "exported" / "model.safetensors") for run in (whole, tmp_path / "run"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_it_learns(squares, tmp_path):
    options = SMALL | {"epochs": 12, "ema_decay": 0, "image_size": 32, "stem_stride": 1, "layer_decay": 1}
    options |= {"head_channels": 32, "lr": 3e-3, "depths": "1,1,1,1", "dims": "16,32,64,128"}
    run = tmp_path / "run"
    finetune(data=squares, out=run, from_scratch=True, crop="native", eval_every=12, rotate=True, **options)
    losses = [row["loss"] for row in rows(run)]
    assert losses[0] == pytest.approx(0.6931 * (1 + AUXILIARY), abs=0.4)
    assert rows(run, "evaluations")[-1]["miou"] > 0.9
    out = predict(data=squares / "val" / "images", init=run, out=tmp_path / "masks", num_workers=0)
    found, true = (np.asarray(Image.open(folder / "0.png")) for folder in (out, squares / "val" / "masks"))
    assert set(np.unique(found)) == {0, 3}
    assert (found == true).mean() > 0.95


def test_the_loss_is_that_of_the_pixels_that_count():
    model = Segmenter("atto", num_classes=3, head_channels=8, image_size=32, stem_stride=1).eval()
    form = ImageFormat("uint8", (100.0,) * 3, (50.0,) * 3)
    pixels = torch.randint(256, (2, 32, 40, 3), dtype=torch.uint8)
    labels = torch.randint(-1, 3, (2, 32, 40), dtype=torch.int16)
    loss = SegmentationObjective(model, form)(pixels, labels)
    images = (pixels.permute(0, 3, 1, 2).double() - 100) / 50
    expected = 0.0
    for weight, logits in zip((1, AUXILIARY), model.both(images.float()), strict=True):
        logs = F.log_softmax(logits.double(), 1).permute(0, 2, 3, 1)
        kept = labels >= 0
        expected += weight * -logs[kept].gather(1, labels[kept].long()[:, None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert SegmentationObjective(model, form)(pixels, torch.full_like(labels, -1)).item() == 0


@pytest.mark.parametrize("kind", [RandomView, NativeView])
def test_image_and_mask_stay_together(kind):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, (15, 20)).repeat(8, 0).repeat(7, 1).astype(np.uint8)
    image = np.stack([values * 100] * 3, -1)
    view = PairView(kind((48, 64), Reading(), rotate=True), MaskClasses((0, 1, 2), ("a", "b", "c")))
    for seed in range(8):
        pixels, labels = view(Pair(image, values), np.random.default_rng(seed))
        assert (pixels.shape, labels.shape, labels.dtype) == ((48, 64, 3), (48, 64), torch.int16)
        found = (pixels[..., 0].double() / 100).round().clamp(0, 2)
        assert (found == labels).double().mean() > (0.999 if kind is NativeView else 0.7)  # bicubic beside nearest
    with pytest.raises(OSError, match="its mask has 59x140 pixels, and its image 120x140"):
        view(Pair(image, values[:59]), np.random.default_rng(0))
    with pytest.raises(OSError, match="has the value 9"):
        view(Pair(image, np.full_like(values, 9)), np.random.default_rng(0))


def test_a_step_that_is_skipped_leaves_the_statistics_as_they_were():
    model = Segmenter("atto", num_classes=2, head_channels=8, image_size=32, stem_stride=1).train()
    objective = SegmentationObjective(model, ImageFormat("float32", (0.0,) * 3, (1.0,) * 3))
    step = TrainStep(objective, adamw(model, 0.0, (0.9, 0.999)), images_per_rank=2)
    pixels, labels = torch.randn(2, 32, 32, 3), torch.zeros(2, 32, 32, dtype=torch.int16)
    handle = model.backbone.stages[0].register_forward_hook(lambda *given: given[-1] * float("nan"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step.add(pixels, labels, last=True)
    assert not step.finish().grad_norm.isfinite()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if value.is_floating_point())
    handle.remove()
    step.add(pixels, labels, last=True)
    assert step.finish().grad_norm.isfinite()
    assert not torch.equal(
        before["decode_head.bottleneck.batch_norm.running_mean"],
        model.decode_head.bottleneck.batch_norm.running_mean,
    )


def test_the_average_has_the_average_of_the_statistics():
    model = Segmenter("atto", num_classes=2, head_channels=8, image_size=32, stem_stride=1).train()
    average, norm = moving_average(model, 0.75), model.decode_head.bottleneck.batch_norm
    average.update_parameters(model)
    first = norm.running_mean.clone()
    norm.running_mean.add_(1.0)
    average.update_parameters(model)
    found = average.module.decode_head.bottleneck.batch_norm.running_mean
    assert torch.allclose(found, first + 0.25)


def test_a_frozen_encoder_gives_the_same_features_each_time(squares, encoder, tmp_path):
    run = tmp_path / "run"
    finetune(data=squares, out=run, init=encoder, freeze_encoder=True, **SMALL | {"epochs": 1})
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, run / "exported"))
    assert all(torch.equal(after[f"backbone.{name}"], value) for name, value in before.items())
    model = Segmenter("atto", num_classes=2, head_channels=8, image_size=32, stem_stride=1, drop_path=0.5)
    model.backbone.requires_grad_(False)
    model.train()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.backbone(images), model.backbone(images))
    assert model.decode_head.training


def test_a_checkpoint_is_a_model_too(whole, squares, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(whole, unfinished)
    for name in ("exported", "exported-ema"):
        shutil.rmtree(unfinished / name)
    found = evaluate(
        data=str(squares), init=str(unfinished / "checkpoints" / "step-00000004"), num_workers=0, dtype="fp32"
    )
    assert found["miou"] == pytest.approx(rows(whole, "evaluations")[-1]["miou"])


def test_another_split_is_said(squares, encoder, tmp_path, capsys):
    (tmp_path / "images").symlink_to(squares / "train" / "images")
    (tmp_path / "masks").symlink_to(squares / "train" / "masks")
    run = tmp_path / "runs" / "a"
    finetune(data=tmp_path, masks=None, out=run, init=encoder, val_split=0.5, **SMALL | {"epochs": 1})
    for split, said in ((0.5, False), (0.25, True), (None, True)):
        capsys.readouterr()
        found = evaluate(data=str(tmp_path), init=str(run), val_split=split, num_workers=0)
        assert ("was trained with --val-split 0.5 --seed 0" in capsys.readouterr().out) is said
        assert found["images"] == {0.5: 4, 0.25: 2, None: 8}[split]
    finetune(out=run, resume=True)  # its own pictures are not taken for images


def test_all_values_may_be_classes(squares, encoder, tmp_path):
    run = tmp_path / "run"
    finetune(data=squares, out=run, init=encoder, ignore="none", **SMALL | {"max_steps": 1, "ema_decay": 0})
    assert json.loads((run / "exported" / "config.json").read_text())["mask_values"] == [0, 3, 255]
    log = (run / "train.log").read_text()
    assert "classes of pixels: 0, 3, 255" in log
    assert "are ignored" not in log


def test_mistakes_are_one_line(squares, encoder, tmp_path, capsys):
    usual = ["finetune", "--task", "segmentation", "--data", squares, "--out", tmp_path / "run", "--num-workers", 0]
    begun = [*usual, "--init", encoder]
    assert "--mixup is of --task classification: leave it out" in fails(capsys, *begun, "--mixup", 0.5)
    assert "--class-names has 3 names, and the masks have 2 classes: 0, 3" in fails(
        capsys, *begun, "--class-names", "a,b,c"
    )
    for batches in (["--batch-size", 1], ["--batch-size", 5, "--micro-batch-size", 2]):
        assert "leave a micro-batch of one image" in fails(capsys, *begun, *batches)
    assert "--class-names no.txt: no such file" in fails(capsys, *begun, "--class-names", "no.txt")
    assert "has a name twice" in fails(capsys, *begun, "--class-names", "a,a")
    assert "--label-column goes with a table" in fails(capsys, *begun, "--label-column", "x")
    assert "pages can't be paired with masks" in fails(capsys, *begun, "--pages", "images")
    assert "--ignore x: give numbers" in fails(capsys, *begun, "--ignore", "x")
    other = tmp_path / "other"
    shutil.copytree(squares, other)
    mask = np.asarray(Image.open(other / "val" / "masks" / "0.png")).copy()
    mask[1, 1] = 8
    Image.fromarray(mask).save(other / "val" / "masks" / "0.png")
    changed = [part if part != squares else other for part in begun]
    assert "held-out masks have the value 8, and no mask that is trained on has it" in fails(capsys, *changed)
    Image.fromarray(mask[1:]).save(other / "val" / "masks" / "0.png")
    assert "the mask of val/images/0.png has" in fails(capsys, *changed)
    assert "--masks is of --task segmentation" in fails(
        capsys, "finetune", "--data", squares, "--masks", squares, "--init", encoder, "--out", tmp_path / "run"
    )
    assert "--parallel does not go with --task segmentation" in fails(capsys, *begun, "--parallel", "fsdp")
    assert not (tmp_path / "run").exists()
