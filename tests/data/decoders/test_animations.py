"""The frames of animated GIF, PNG, WebP and AVIF are pages, of which none is dropped in silence."""

import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageSequence, features

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.sources.pages import by_page

WHOLE = (0, 0, 40, 24)


@pytest.fixture(params=["gif", "png", "webp", "avif"])
def animation(request, tmp_path):
    """A file of four frames, and what is in it, [4, 24, 40, 3], by Pillow's own iterator."""
    if request.param in ("webp", "avif") and not features.check(request.param):
        pytest.skip(f"Pillow is built without {request.param}")
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (3, 5, 3), dtype=np.uint8)).resize((40, 24)) for _ in range(4)]
    path = tmp_path / f"x.{request.param}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    with Image.open(path) as image:
        return path, np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def test_an_animation_is_refused_until_pages_are_said(animation):
    with pytest.raises(OSError, match="has 4 frames: --pages says what they are, channels, max or images"):
        open_image(animation[0], Reading())


def test_frames_are_images(animation):
    path, expected = animation
    reading = Reading(pages="images")
    with pytest.raises(OSError, match="has 4 frames, each an image: say which"):
        open_image(path, reading)
    Image.fromarray(expected[0]).save(path.parent / "y.bmp")
    source = by_page(open_images(path.parent), reading)
    assert [source.name(number) for number in (3, 4)] == [f"{path.name} page 4", "y.bmp page 1"]
    for number in (2, 0, 3, 1):
        with source.open(number) as file:
            image = open_image(file, reading)
            assert (image.is_photograph, image.pages, image.size) == (True, 4, (40, 24))
            assert np.array_equal(image.resized_crop(WHOLE, (24, 40)).numpy(), expected[number])


def test_frames_are_channels_or_their_greatest_values(animation):
    path, expected = animation
    side_by_side = open_image(path, Reading(12, pages="channels")).resized_crop((3, 2, 33, 20), (18, 30))
    assert np.array_equal(side_by_side.numpy(), np.moveaxis(expected, 0, 2).reshape(24, 40, 12)[2:20, 3:33])
    greatest = open_image(path, Reading(3, pages="max")).resized_crop(WHOLE, (24, 40))
    assert np.array_equal(greatest.numpy(), expected.max(0))


def test_previews_within_a_photograph_are_no_pages(tmp_path):
    colours = [Image.new("RGB", (40, 24), colour) for colour in ("red", "blue")]
    colours[0].save(tmp_path / "x.mpo", save_all=True, append_images=colours[1:])
    pixels = open_image(tmp_path / "x.mpo", Reading()).resized_crop(WHOLE, (24, 40))
    assert pixels.float().mean((0, 1)).tolist() == pytest.approx([254, 0, 0], abs=1)


def test_frames_of_sixteen_bits_and_of_other_formats_are_not_dropped(tmp_path):
    still = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    still[0].save(tmp_path / "x.png", save_all=True, append_images=still[1:])
    eight = (tmp_path / "x.png").read_bytes()
    place = eight.index(b"acTL") - 4
    sixteen = imagecodecs.png_encode(np.zeros((8, 8, 3), np.uint16))
    (tmp_path / "x.png").write_bytes(sixteen[:33] + eight[place : place + 20] + sixteen[33:])
    with pytest.raises(OSError, match=r"has \d frames of 16 bits: save each as a file of its own"):
        open_image(tmp_path / "x.png", Reading(3, "uint16"))


def test_an_open_animation_is_refused(animation):
    with Image.open(io.BytesIO(animation[0].read_bytes())) as image:
        source = open_images([image])
        with pytest.raises(OSError, match="has 4 frames: give each as an image of its own"):
            source.open(0)
