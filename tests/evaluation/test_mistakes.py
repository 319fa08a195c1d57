"""The worst answers of a classifier, and their picture."""

import numpy as np
import torch
from PIL import Image

from sparse_fcmae.data.decoders.image import PHOTOGRAPHS
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.class_folder import class_folder
from sparse_fcmae.evaluation.mistakes import MOST, Answers, draw_mistakes, worst
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.evaluation.sheet import ACROSS, CAPTION_WIDTH, GAP, LABEL_HEIGHT

VIEW = EvaluationView((8, 8), ImageFormat.imagenet(), PHOTOGRAPHS, 1.0, torch.device("cpu"))


def answers(probability_of_first, index):
    """Of two classes, the first with these probabilities."""
    p = torch.tensor(probability_of_first)
    return Answers.of(torch.stack([p, 1 - p], 1).log(), torch.tensor(index), 5)


def test_the_most_certain_mistakes_come_first():
    found = answers([0.9, 0.6, 0.2, 0.95], [0, 3, 4, 7])
    assert found.ranked.tolist() == [[0, 1], [0, 1], [1, 0], [0, 1]]
    assert torch.allclose(found.probabilities, torch.tensor([0.9, 0.6, 0.8, 0.95]))
    assert worst(found, torch.tensor([1, 1, 1, 1])) == [3, 0, 1]
    assert worst(found, torch.tensor([0, 0, 1, 0])) == []
    many = answers([0.9] * 100, list(range(100)))
    assert worst(many, torch.ones(100, dtype=torch.int64)) == list(range(MOST))


def test_a_picture_shows_them(tmp_path):
    colours = {"green": (0, 255, 0), "red": (255, 0, 0)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / f"{number}.png")
    source = class_folder(tmp_path)
    found = answers([0.9, 0.9, 0.9, 0.1, 0.8, 0.1, 0.1, 0.99], list(range(8)))
    picture = draw_mistakes(found, source.labels, source.classes, source, VIEW)
    side = -(-CAPTION_WIDTH // 8) * 8
    each = side + 2 * LABEL_HEIGHT + 2 * GAP
    assert picture.size == (3 * (side + GAP) + GAP, each)
    middles = [picture.getpixel((GAP + n * (side + GAP) + side // 2, each - side // 2)) for n in range(3)]
    assert middles == [colours["red"], colours["green"], colours["red"]]
    text = np.asarray(picture.convert("L"))[GAP : GAP + 2 * LABEL_HEIGHT]
    assert (text < 128).any()
    assert draw_mistakes(found, torch.tensor([0, 0, 0, 1, 0, 1, 1, 0]), source.classes, source, VIEW) is None


def test_pictures_stand_in_rows(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for number in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / "b" / f"{number:02}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png")
    source = class_folder(tmp_path)
    found = answers([0.9] * 31, list(range(31)))
    width, height = draw_mistakes(found, source.labels, source.classes, source, VIEW).size
    side = -(-CAPTION_WIDTH // 8) * 8
    assert width == ACROSS * (side + GAP) + GAP
    assert height == MOST // ACROSS * (side + 2 * LABEL_HEIGHT + 2 * GAP)


def test_an_image_that_is_gone_is_said(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / name / "0.png")
    source = class_folder(tmp_path)
    found, labels = answers([0.9, 0.8], [0, 1]), torch.tensor([1, 1])
    whole = np.asarray(draw_mistakes(found, labels, source.classes, source, VIEW))
    (tmp_path / "a" / "0.png").unlink()
    partly = np.asarray(draw_mistakes(found, labels, source.classes, source, VIEW))
    assert whole.shape == partly.shape
    assert (whole[-20, 20] == (255, 0, 0)).all()
    assert (partly[-20, 20] == 0).all()
