import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sparse_fcmae import UserError
from sparse_fcmae.data.decoders.image import PHOTOGRAPHS
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.evaluation.problems import PROBLEMS, average_precision, measure_outputs
from sparse_fcmae.evaluation.run import EvaluationSet, EvaluationView, run_model

SEVERAL, NUMBERS = PROBLEMS["multilabel"], PROBLEMS["regression"]
VIEW = EvaluationView((8, 8), ImageFormat.imagenet(), PHOTOGRAPHS, 1.0, torch.device("cpu"), batch_size=3)


def by_thresholds(scores, true):
    """Average precision by its definition: over each threshold, what recall it adds times its precision."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        recall = (found & true).sum().item() / true.sum().item()
        total += (recall - before) * (found & true).sum().item() / found.sum().item()
        before = recall
    return total


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision(ties):
    for _ in range(20):
        scores, true = torch.randn(30), torch.rand(30) < 0.3
        true[0] = True
        scores = scores.round() if ties else scores
        assert average_precision(scores, true) == pytest.approx(by_thresholds(scores, true))


def test_several_labels():
    texts = ("cat;dog", "", "dog; newt", "cat")
    outputs = SEVERAL.outputs_of(texts)
    assert outputs == ("cat", "dog", "newt")
    targets = torch.tensor([SEVERAL.target(text, outputs) for text in texts])
    assert targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]
    logits = torch.randn(4, 3)
    found = SEVERAL.scores(logits, targets)
    true, said = targets.bool(), logits.sigmoid() > 0.5
    assert found["f1"] == pytest.approx(2 * (true & said).sum().item() / (true.sum() + said.sum()).item())
    expected = [by_thresholds(logits[:, label], true[:, label]) for label in range(3)]
    assert found["mean_average_precision"] == pytest.approx(sum(expected) / 3)
    by_label = SEVERAL.by_output(logits, targets, outputs)["average_precision_by_label"]
    assert list(by_label) == ["cat", "dog", "newt"]
    assert list(by_label.values()) == pytest.approx(expected)
    targets_without = targets * torch.tensor([1, 0, 1])  # a label of no image has no precision
    assert list(SEVERAL.by_output(logits, targets_without, outputs)["average_precision_by_label"]) == ["cat", "newt"]
    p = logits.sigmoid()
    assert found["loss"] == pytest.approx(-(targets * p.log() + (1 - targets) * (1 - p).log()).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="the label bird is none of those that are trained: cat, dog, newt"):
        SEVERAL.target("bird;cat", outputs)
    with pytest.raises(UserError, match="no image has a label"):
        SEVERAL.outputs_of(("", " ; "))


def test_numbers():
    logits, targets = torch.tensor([[1.0], [2], [4]]), torch.tensor([[1.5], [2], [2]])
    found = NUMBERS.scores(logits, targets)
    assert found["mae"] == pytest.approx(2.5 / 3)
    assert found["rmse"] == pytest.approx((4.25 / 3) ** 0.5)
    assert found["r2"] == pytest.approx(1 - (4.25 / 3) / targets.var(correction=0).item())
    assert NUMBERS.target(" -1.5e3 ", ("value",)) == [-1500]
    for text in ("tall", "nan", "inf", ""):
        with pytest.raises(ValueError, match=r"is no number|is not finite"):
            NUMBERS.target(text, ("value",))


@pytest.mark.parametrize("world", [1, 2, 7])
def test_ranks_measure_together(tmp_path, on_ranks, world):
    for number in range(5):
        Image.new("RGB", (8, 8), (40 * number, 90, 10)).save(tmp_path / f"{number}.png")
    images = Labelled.by_names(ImageFolder(tmp_path), ["1.5", "2.5", "0", "-3", "2.5"])
    models = {prefix: nn.Sequential(nn.Flatten(), nn.Linear(192, 1)) for prefix in ("", "ema_")}
    scale = torch.tensor([0.7, 2.0])

    def run(ranks):
        own = images.take(range(ranks.rank, 5, world))
        return measure_outputs(
            models, EvaluationSet(own, VIEW), NUMBERS.targets(own, ("value",)), NUMBERS, ranks, scale
        )

    targets = torch.tensor([[1.5], [2.5], [0], [-3], [2.5]])
    for prefix, model in models.items():
        outputs, _, _ = run_model(EvaluationSet(images, VIEW), model)
        expected = NUMBERS.scores(outputs * 2 + 0.7, targets)
        for values, bad in on_ranks(world, run):
            assert bad == []
            assert values[f"{prefix}mae"] == pytest.approx(expected["mae"])
            assert values[f"{prefix}loss"] == pytest.approx(F.mse_loss(outputs * 2 + 0.7, targets).item(), rel=1e-5)


def test_a_wrong_label_names_its_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    images = Labelled.by_names(ImageFolder(tmp_path), ["tall"])
    with pytest.raises(UserError, match=r"0\.png: the label 'tall' is no number"):
        NUMBERS.targets(images, ("value",))
