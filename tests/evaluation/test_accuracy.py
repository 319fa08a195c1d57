from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sparse_fcmae import UserError
from sparse_fcmae.data.decoders.image import PHOTOGRAPHS
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.class_folder import class_folder
from sparse_fcmae.evaluation.accuracy import accuracy, measure
from sparse_fcmae.evaluation.run import EvaluationSet, EvaluationView, run_model

VIEW = EvaluationView(
    size=(8, 8),
    form=ImageFormat.imagenet(),
    reading=PHOTOGRAPHS,
    crop_fraction=1.0,
    device=torch.device("cpu"),
    batch_size=5,
)


def ranked(logits):
    """The classes by their logits, up to five."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, :5]


def test_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1], [0, 2, 1], [0, 1, 2], [1, 3, 2]])
    found = accuracy(ranked(logits), torch.tensor([0, 1, 1, 2]), ("a", "b", "c"))
    assert (found["images"], found["top1"]) == (4, 0.5)
    assert "top5" not in found
    assert found["by_class"] == {"a": 1, "b": 0.5, "c": 0}
    assert found["balanced_accuracy"] == 0.5
    uneven = accuracy(ranked(logits[:3]), torch.tensor([0, 1, 1]), ("a", "b", "c"))
    assert (uneven["top1"], uneven["balanced_accuracy"]) == pytest.approx((2 / 3, 0.75))
    assert found["confusion"]["counts"] == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]
    six = accuracy(ranked(torch.arange(6.0).repeat(6, 1)), torch.arange(6), tuple("abcdef"))
    assert (six["top1"], six["top5"]) == pytest.approx((1 / 6, 5 / 6))


def part_of(folder, ranks, world):
    return folder.take(range(ranks.rank, len(folder), world))


@pytest.mark.parametrize("world", [1, 2, 20])
def test_measure_is_accuracy_and_loss_of_all_ranks_images(colours, on_ranks, world):
    folder = class_folder(colours / "val")
    models = {prefix: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)) for prefix in ("", "ema_")}
    results = on_ranks(world, lambda ranks: measure(models, EvaluationSet(part_of(folder, ranks, world), VIEW), ranks))
    for prefix, model in models.items():
        logits, index, _ = run_model(EvaluationSet(folder, VIEW), model)
        expected = accuracy(ranked(logits), folder.labels[index], folder.classes)
        for values, bad in results:
            assert bad == []
            assert values[f"{prefix}top1"] == pytest.approx(expected["top1"])
            assert values[f"{prefix}balanced_accuracy"] == pytest.approx(expected["balanced_accuracy"])
            assert f"{prefix}top5" not in values
            assert values[f"{prefix}loss"] == pytest.approx(F.cross_entropy(logits, folder.labels[index]).item())
        assert model.training


def test_top5_is_measured_of_six_classes(tmp_path, on_ranks):
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (8, 8), (40 * number,) * 3).save(tmp_path / str(number) / "x.png")
    folder, model = class_folder(tmp_path), nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    logits, _, _ = run_model(EvaluationSet(folder, VIEW), model.eval())
    part = lambda ranks: EvaluationSet(folder.take([ranks.rank, 3]), VIEW)  # noqa: E731
    for values, _ in on_ranks(2, lambda ranks: measure({"": model}, part(ranks), ranks)):
        images = [0, 3, 1, 3]
        expected = accuracy(ranked(logits[images]), torch.tensor(images), folder.classes)
        assert (values["top1"], values["top5"]) == pytest.approx((expected["top1"], expected["top5"]))


def test_a_rank_that_can_read_none_of_its_images_leaves_it_to_the_others(tmp_path, on_ranks):
    """Every second image is smaller than a window, and with two ranks these are all that one of them has."""
    for number in range(6):
        (tmp_path / str(number % 3)).mkdir(exist_ok=True)
        side = 8 if number in (0, 1, 2) else 4
        Image.new("RGB", (side, side), (40 * number,) * 3).save(tmp_path / str(number % 3) / f"{number}.png")
    folder, view = class_folder(tmp_path), replace(VIEW, native=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    alone, bad = on_ranks(1, lambda ranks: measure({"": model}, EvaluationSet(folder, view), ranks))[0]
    assert sorted(image.name for image in bad) == ["0/3.png", "1/4.png", "2/5.png"]
    for values, found in on_ranks(
        2, lambda ranks: measure({"": model}, EvaluationSet(part_of(folder, ranks, 2), view), ranks)
    ):
        assert values == pytest.approx(alone)
        assert sorted(found) == sorted(bad)
    small = folder.take([1, 3, 5])
    with pytest.raises(UserError, match=r"no image of .* is readable: 0/3.png: has 4x4 pixels, fewer than"):
        on_ranks(1, lambda ranks: measure({"": model}, EvaluationSet(small, view), ranks))
