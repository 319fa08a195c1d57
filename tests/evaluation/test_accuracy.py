import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_fcmae.data.decoders.image import PHOTOGRAPHS
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.class_folder import class_folder
from sparse_fcmae.evaluation.accuracy import accuracy, measure
from sparse_fcmae.evaluation.run import EvaluationView, run_model

VIEW = EvaluationView(
    size=(8, 8),
    form=ImageFormat.imagenet(),
    reading=PHOTOGRAPHS,
    crop_fraction=1.0,
    device=torch.device("cpu"),
    batch_size=5,
)


def test_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1], [0, 2, 1], [0, 1, 2], [1, 3, 2]])
    found = accuracy(logits, torch.tensor([0, 1, 1, 2]), ("a", "b", "c"))
    assert (found["images"], found["top1"], found["top5"]) == (4, 0.5, 1)
    assert found["by_class"] == {"a": 1, "b": 0.5, "c": 0}
    assert found["confusion"]["counts"] == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("world", [1, 2, 20])
def test_measure_is_accuracy_and_loss_of_all_ranks_images(colours, on_ranks, world):
    folder = class_folder(colours / "val")
    models = {prefix: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)) for prefix in ("", "ema_")}
    results = on_ranks(
        world, lambda ranks: measure(models, folder.take(range(ranks.rank, len(folder), world)), VIEW, ranks)
    )
    for prefix, model in models.items():
        logits, index, _ = run_model(folder, model, VIEW)
        expected = accuracy(logits, folder.labels[index], folder.classes)
        for values, bad in results:
            assert bad == []
            assert values[f"{prefix}top1"] == pytest.approx(expected["top1"])
            assert values[f"{prefix}top5"] == expected["top5"] == 1
            assert values[f"{prefix}loss"] == pytest.approx(F.cross_entropy(logits, folder.labels[index]).item())
        assert model.training
