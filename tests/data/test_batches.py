import io
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sparse_fcmae.data.batches import EvaluationImages, TrainingImages, make_loader, micro_batches
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.class_folder import class_folder
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.splits import few_labels, hold_out
from sparse_fcmae.data.views import CentreView, RandomView


class ImagesInMemory:
    """A labelled source that is no folder: encoded images as bytes."""

    classes = ("dark", "light")

    def __init__(self, encoded, labels):
        self.encoded, self.labels = encoded, torch.as_tensor(labels)
        self.fingerprint = str(hash(tuple(encoded)))

    @classmethod
    def draw(cls, count):
        labels, encoded = [i % 2 for i in range(count)], []
        for i, label in enumerate(labels):
            file = io.BytesIO()
            Image.new("RGB", (20, 20), (40 + 120 * label + i,) * 3).save(file, format="PNG")
            encoded.append(file.getvalue())
        return cls(encoded, labels)

    def __len__(self):
        return len(self.encoded)

    def open(self, index):
        return io.BytesIO(self.encoded[index])

    def name(self, index):
        return f"image {index}"

    def take(self, indices):
        return ImagesInMemory([self.encoded[i] for i in indices], self.labels[list(indices)])


def test_a_source_that_is_no_folder_trains(tmp_path):
    """The same bytes from memory and from a folder give the same batches, and a model learns from them."""
    source = ImagesInMemory.draw(30)
    for i, encoded in enumerate(source.encoded):
        (tmp_path / f"{i:02d}.png").write_bytes(encoded)
    view, order = RandomView((16, 16)), list(micro_batches(30, 10, range(9), 4, 0, 1, 10))
    loader = make_loader(TrainingImages(source, view, seed=4), order, 2, pin_memory=False)
    of_folder = make_loader(TrainingImages(ImageFolder(tmp_path), view, seed=4), order, 0, pin_memory=False)
    model = torch.nn.Linear(3 * 16 * 16, 2)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for batch, same in zip(loader, of_folder, strict=True):
        assert torch.equal(batch.pixels, same.pixels)
        assert torch.equal(batch.index, same.index)
        loss = F.cross_entropy(
            model(ImageFormat.imagenet().normalise(batch.pixels).flatten(1)), source.labels[batch.index]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_source_that_is_no_folder_is_split_and_names_its_bad_images():
    source = ImagesInMemory.draw(20)
    train, held_out = hold_out(few_labels(source, 8, seed=0), 0.25, seed=0)
    assert (train.labels.bincount().tolist(), held_out.labels.bincount().tolist()) == ([6, 6], [2, 2])
    source.encoded[3] = b"no picture"
    (batch,) = make_loader(EvaluationImages(source, CentreView((16, 16))), [range(20)], 0, pin_memory=False)
    assert batch.index.tolist() == [i for i in range(20) if i != 3]
    assert batch.bad == [("image 3", "no image of a known format")]


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("torn\nin two")])
def test_sources_may_fail_like_files(error):
    class Broken(ImagesInMemory):
        def open(self, index):
            raise error

    dataset = EvaluationImages(Broken.draw(2), CentreView((16, 16)))
    assert dataset[1] == (None, 1, [("image 1", " ".join(str(error).split()))], None, None)


def test_samples_depend_on_seed_epoch_and_index_alone(pictures):
    source, view = ImageFolder(pictures), RandomView((32, 32))
    first, again, other = (TrainingImages(source, view, seed) for seed in (1, 1, 2))
    assert torch.equal(first[0, 5].pixels, again[0, 5].pixels)
    for key in ((1, 5), (0, 6)):
        assert not torch.equal(first[0, 5].pixels, first[key].pixels)
    assert not torch.equal(first[0, 5].pixels, other[0, 5].pixels)
    with source.open(5) as file:
        crop = view(file, np.random.default_rng((1, 1, 0, 5)))  # the numbers that runs of earlier versions go on with
    assert torch.equal(first[0, 5].pixels, crop)


def test_micro_batches_cover_every_epoch_alike_for_any_number_of_ranks():
    def keys(world, micro, steps=range(7)):
        ranks = [list(micro_batches(25, 8, steps, 3, rank, world, micro)) for rank in range(world)]
        per_step = len(ranks[0]) // len(steps)
        return [
            [key for batches in ranks for batch in batches[s * per_step : (s + 1) * per_step] for key in batch]
            for s in range(len(steps))
        ]

    alone = keys(1, 8)
    assert alone == keys(2, 4) == keys(4, 1) == keys(1, 3)
    assert keys(1, 8, range(4, 7)) == alone[4:]
    for epoch in (0, 1):
        batches = alone[3 * epoch : 3 * epoch + 3]
        assert {e for batch in batches for e, _ in batch} == {epoch}
        assert len({i for batch in batches for _, i in batch}) == 24
    order = np.random.default_rng((3, 2, 0)).permutation(25)  # the one that runs of earlier versions go on with
    assert alone[0] == [(0, index) for index in order[:8]]


def test_loader_gives_the_same_batches_on_any_number_of_workers(pictures):
    dataset = TrainingImages(ImageFolder(pictures), RandomView((16, 24), Reading(1)), 0)
    batches = [
        list(make_loader(dataset, micro_batches(40, 8, range(3), 0, 0, 1, 8), workers, pin_memory=False))
        for workers in (0, 2)
    ]
    for a, b in zip(*batches, strict=True):
        assert a.pixels.shape == (8, 16, 24, 1)
        assert torch.equal(a.pixels, b.pixels)


def test_unreadable_files_are_named_and_replaced(tmp_path, ramp):
    (tmp_path / "broken.png").write_text("no picture")
    Image.fromarray(ramp).save(tmp_path / "good.png")
    dataset = TrainingImages(ImageFolder(tmp_path), RandomView((16, 16)), 0)
    pixels, index, bad, *_ = dataset[0, 0]
    assert pixels.shape == (16, 16, 3)
    assert dataset.source.files[index] == "good.png"
    assert {image.name for image in bad} == {"broken.png"}
    (tmp_path / "good.png").write_text("no picture either")
    assert dataset[0, 0].pixels is None


def test_labels_follow_images_that_replace_unreadable_ones(tmp_path):
    """Every class has a colour, so that a wrong label shows: the labels that were trained on fit the pixels."""
    for label, name in enumerate(("dark", "light")):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (200 * label,) * 3).save(tmp_path / name / f"{i}.png")
    (tmp_path / "dark" / "0.png").write_text("no picture")
    folder = class_folder(tmp_path)
    dataset = TrainingImages(folder, RandomView((16, 16)), 0)
    for epoch in range(5):
        (batch,) = make_loader(dataset, [[(epoch, i) for i in range(8)]], 0, False)
        assert len(batch.bad) >= 1
        assert torch.equal((batch.pixels.flatten(1).float().mean(1) > 100).long(), folder.labels[batch.index])


PROGRAM = """
import sys
from sparse_fcmae.data.batches import TrainingImages, make_loader
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import RandomView

dataset = TrainingImages(ImageFolder(sys.argv[1]), RandomView((16, 16)), 0)
batches = iter(make_loader(dataset, [[(0, i)] for i in range(40)], 1, pin_memory=False))
cycle = [batches]
cycle.append(cycle)
next(batches)
if sys.argv[2] == "raises":
    raise RuntimeError("in the middle")
"""


@pytest.mark.parametrize(("end", "code"), [("returns", 0), ("raises", 1)])
def test_loader_processes_do_not_keep_a_program_from_ending(pictures, end, code):
    command = [sys.executable, "-c", PROGRAM, str(pictures), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == code
    assert done.stderr.count("Traceback") == code


def test_other_processes_are_left_to_their_program(tmp_path):
    """They get Python's own SIGTERM at exit, and may tidy up."""
    program = "import multiprocessing, signal, sys, time, pathlib\n"
    program += "def tidy(*_):\n    pathlib.Path(sys.argv[1]).touch()\n    sys.exit()\n"
    program += "def work():\n    signal.signal(signal.SIGTERM, tidy)\n    ready.set()\n    time.sleep(100)\n"
    program += "import sparse_fcmae.data.batches\nfork = multiprocessing.get_context('fork')\nready = fork.Event()\n"
    program += "fork.Process(target=work, daemon=True).start()\nready.wait()\n"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "tidy")], check=True, timeout=100)
    assert (tmp_path / "tidy").exists()
