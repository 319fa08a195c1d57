"""The drawn images, and what the demo asks of pretraining, which is pretended here."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.demo import CLASSES, SHAPES, TEXTURES, demo, draw_image, draw_images


@pytest.fixture
def pretrained(monkeypatch):
    """Has pretraining draw a picture and nothing else; the options that it was called with."""
    calls = []

    def pretrain(**options):
        calls.append(options)
        pictures = options["out"] / "reconstructions"
        pictures.mkdir(parents=True, exist_ok=True)
        for step in (3, 12):
            (pictures / f"step-{step:08d}.png").touch()
        return options["out"] / "exported"

    monkeypatch.setattr("sparse_fcmae.tasks.pretraining.pretrain", pretrain)
    return calls


def pixels(label, seed):
    return np.asarray(draw_image(label, seed)).astype(int)


def test_there_is_a_class_for_each_shape_in_each_texture():
    assert len(CLASSES) == len(set(CLASSES)) == len(SHAPES) * len(TEXTURES) == 10
    assert set(CLASSES) == {f"{texture}-{shape}" for texture in TEXTURES for shape in SHAPES}


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_ring_is_a_disc_with_a_hole(texture):
    """Of the same seed: the same picture but for a hole of half the radius, 0.12 to 0.18 of the side."""
    disc, ring = CLASSES.index(f"{texture}-disc"), CLASSES.index(f"{texture}-ring")
    for seed in range(5):
        hole = (np.abs(pixels(disc, (seed,)) - pixels(ring, (seed,))) > 8).any(-1)
        area = hole.mean()
        assert 3.14 * 0.11**2 < area < 3.14 * 0.24**2
        rows, cols = hole.nonzero()
        assert np.hypot(rows - rows.mean(), cols - cols.mean()).max() < 0.24 * 64


def test_textures_and_shapes_are_told_apart_by_their_pixels():
    pictures = {label: pixels(label, (1,)) for label in range(len(CLASSES))}
    for a in pictures:
        for b in range(a):
            differing = (np.abs(pictures[a] - pictures[b]).max(-1) > 20).mean()
            assert differing > 0.01, (CLASSES[a], CLASSES[b])
    assert all(p.shape == (64, 64, 3) for p in pictures.values())
    assert all(p.std() > 10 for p in pictures.values())


def test_classes_have_equally_many_images_or_one_more(tmp_path):
    draw_images(tmp_path / "x", 23, seed=5)
    files = sorted((tmp_path / "x").rglob("*.png"))
    assert Counter(file.parent.name for file in files) == {c: 3 if i < 3 else 2 for i, c in enumerate(CLASSES)}
    assert sorted(file.name for file in files) == [f"{i:05d}.png" for i in range(23)]
    for i in (0, 12):
        (file,) = (tmp_path / "x").rglob(f"{i:05d}.png")
        assert Image.open(file).tobytes() == draw_image(i % 10, (5, i)).tobytes()
    draw_images(tmp_path / "x", 10, seed=6)
    assert len(list((tmp_path / "x").rglob("*.png"))) == 10


def test_pretraining_is_asked_for_on_the_drawn_images(tmp_path, pretrained, capsys):
    out = tmp_path / "deep" / "demo"
    assert demo(out=out, images=250, epochs=10, seed=3) == out / "run" / "exported"
    (options,) = pretrained
    assert (options["data"], options["out"], options["seed"]) == (out / "images", out / "run", 3)
    assert (options["image_size"], options["stem_stride"], options["epochs"]) == (64, 2, 10)
    assert options["save_every"] == 5  # four times in 20 steps
    assert len(list((out / "images").rglob("*.png"))) == 250
    said = capsys.readouterr().out
    assert "drawing 250 pictures of 10 classes" in said
    assert said.endswith(f"{out / 'run' / 'reconstructions' / 'step-00000012.png'}\n")


def test_an_earlier_demo_is_replaced_where_that_is_asked_for(tmp_path, pretrained):
    demo(out=tmp_path, images=100, epochs=1)
    before = sorted(tmp_path.rglob("*.png"))
    with pytest.raises(UserError, match="holds an earlier demo: give `overwrite=True` to replace it"):
        demo(out=tmp_path, images=110, epochs=1)
    assert sorted(tmp_path.rglob("*.png")) == before
    demo(out=tmp_path, images=110, epochs=1, overwrite=True)
    assert len(list((tmp_path / "images").rglob("*.png"))) == 110
    assert [options["overwrite"] for options in pretrained] == [False, True]
    assert [options["save_every"] for options in pretrained] == [1, 1]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", ["thesis.txt", "images/x.png", "demo.json/x", "run/config.json"])
def test_a_folder_of_the_users_is_left_alone(tmp_path, pretrained, there, overwrite):
    own = tmp_path / "out" / there
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no demo: choose another"):
        demo(out=tmp_path / "out", overwrite=overwrite)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [own]
    assert pretrained == []


def test_folders_that_are_as_good_as_empty_are_taken(tmp_path, pretrained):
    (tmp_path / ".demo.json.77.tmp").touch()
    demo(out=tmp_path, images=100, epochs=1)
    assert len(pretrained) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 99}, "`images` must be at least 100, not 99"),
        ({"epochs": 0}, "`epochs` must be greater than 0, not 0"),
        ({"seed": -1}, "`seed` must be at least 0, not -1"),
    ],
)
def test_options_are_checked_before_anything_is_made(tmp_path, pretrained, options, message):
    with pytest.raises(UserError, match=message):
        demo(out=tmp_path / "out", **options)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: choose another"):
        demo(out=tmp_path / "file")
    assert not (tmp_path / "out").exists()
