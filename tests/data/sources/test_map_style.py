import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from sparse_fcmae import UserError, evaluate, finetune, inspect, pretrain
from sparse_fcmae.data.batches import TrainingImages, make_loader
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.sources.pages import by_page
from sparse_fcmae.data.views import RandomView
from sparse_fcmae.weights.read import read_weights

VALUES = np.random.default_rng(0).integers(0, 4096, (12, 40, 48)).astype(np.uint16)
COLOURS = (VALUES[..., None] >> np.arange(3)).astype(np.uint8)


def pixels(source, index, reading):
    with source.open(index) as file:
        image = open_image(file, reading)
        width, height = image.size
        return image.resized_crop((0, 0, width, height), (height, width)).numpy()


@pytest.mark.parametrize(
    "data",
    [
        COLOURS,
        list(COLOURS),
        [Image.fromarray(values) for values in COLOURS],
        [(values, 7) for values in COLOURS],
        [{"image": values, "label": 7} for values in COLOURS],
        TensorDataset(torch.from_numpy(COLOURS), torch.arange(12)),
        TensorDataset(torch.from_numpy(COLOURS).movedim(-1, 1)),
    ],
    ids=["array", "arrays", "pillow", "tuples", "dicts", "tensors", "channels first"],
)
def test_items_of_every_kind(data):
    source = open_images(data)
    assert len(source) == 12
    for index in (0, 11):
        assert np.array_equal(pixels(source, index, Reading()), COLOURS[index])


def test_lists_of_paths(tmp_path):
    for number, values in enumerate(VALUES[:3]):
        np.save(tmp_path / f"{number}.npy", values)
    places = [tmp_path / f"{number}.npy" for number in (2, 0, 1)]
    for data in (places, tuple(map(str, places)), [(place, "a class") for place in places]):
        source = open_images(data)
        for index, number in enumerate((2, 0, 1)):
            assert np.array_equal(pixels(source, index, Reading(1, "uint16"))[..., 0], VALUES[number])


def test_what_is_no_image_is_said():
    with pytest.raises(TypeError, match="is a int, and not an image of Pillow's, an array, a tensor or a path"):
        open_images([1, 2]).open(0)


def test_pretraining_and_resuming(tmp_path):
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 4, "epochs": 2, "num_workers": 1}
    pretrain(data=VALUES, out=tmp_path / "run", **options)
    form = read_weights(tmp_path / "run").form
    assert (form.dtype, form.in_chans) == ("uint16", 1)
    assert form.mean[0] == pytest.approx(VALUES.mean(), rel=1e-3)
    pretrain(data=VALUES, out=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="memory://ndarray: these images were given in Python, so give `data` again"):
        pretrain(out=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="the images in memory://ndarray are not those"):
        pretrain(data=VALUES[:8], out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_opened_images_stay_as_they_are_in_every_process(tmp_path, kind):
    """Processes that read the same open file would move each other's place in it, and views would reduce the image."""
    opened = []
    for number, values in enumerate(COLOURS):
        Image.fromarray(values).resize((640, 480)).save(tmp_path / f"{number}.{kind.lower()}", kind)
        opened.append(Image.open(tmp_path / f"{number}.{kind.lower()}"))
    images = TrainingImages(open_images(opened), RandomView((32, 32)), 0)
    first = [images[0, index].pixels for index in range(12)]
    loader = make_loader(images, [[(0, index) for index in range(12)]] * 4, 2, pin_memory=False)
    for batch in loader:
        assert batch.bad == []
        assert torch.equal(batch.pixels, torch.stack(first))
    assert all(image.size == (640, 480) for image in opened)


def test_stacks_in_memory_by_page(tmp_path):
    source = by_page(open_images([VALUES[:5], VALUES[5:]]), Reading(1, "uint16", pages="images"))
    assert len(source) == 12
    for index in range(12):
        found = pixels(source, index, Reading(1, "uint16", pages="images"))
        assert np.array_equal(found[..., 0], VALUES[index])


def test_what_can_not_be_data_is_said(tmp_path):
    for data, message in (
        (5, "`data` is a int: give a path"),
        ((x for x in "ab"), "is a generator"),
        (VALUES[:0], "empty"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(data=data, out=tmp_path / "run")
    with pytest.raises(UserError, match="`data` is missing"):
        pretrain(data=None, out=tmp_path / "run")
    assert inspect(data=VALUES)["images"] == 12


def test_only_pretraining_takes_objects(tmp_path):
    for start in (finetune, evaluate):
        with pytest.raises(UserError, match="`data` is of the type ndarray: give a path"):
            start(data=VALUES, init=tmp_path)
