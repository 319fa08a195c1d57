import io
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from sparse_fcmae.data.decoders import open_image, photograph
from sparse_fcmae.data.decoders.image import PHOTOGRAPHS
from sparse_fcmae.data.decoders.photograph import decode, to_eight_bits
from sparse_fcmae.data.views import RandomView


def pixels_of(file, in_chans=3):
    pixels = np.asarray(to_eight_bits(decode(open_image(file, PHOTOGRAPHS).image).image, in_chans))
    assert pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
def test_formats(tmp_path, ramp, suffix):
    options = {"quality": 100} if suffix in ("jpg", "webp") else {}
    Image.fromarray(ramp).save(tmp_path / f"x.{suffix}", **options)
    with (tmp_path / f"x.{suffix}").open("rb") as file:
        pixels = pixels_of(file)
    assert pixels.shape == (30, 40, 3)
    assert np.abs(pixels.astype(int) - ramp).mean() < 8
    assert np.array_equal(pixels_of(tmp_path / f"x.{suffix}"), pixels)


def test_modes(ramp):
    rgb = Image.fromarray(ramp)
    for mode in ("L", "1", "P", "CMYK", "YCbCr", "LA", "La", "HSV"):
        assert pixels_of(rgb.convert(mode)).shape == (30, 40, 3), mode
        assert pixels_of(rgb.convert(mode), in_chans=1).shape == (30, 40), mode
    assert np.array_equal(pixels_of(rgb), ramp)


def test_transparent_pixels_become_white(ramp):
    rgba = np.dstack([np.zeros_like(ramp), np.full((30, 40), 255, np.uint8)])
    rgba[:, :20, 3] = 0
    pixels = pixels_of(Image.fromarray(rgba))
    assert (pixels[:, :20] == 255).all()
    assert (pixels[:, 20:] == 0).all()
    palette = Image.fromarray(ramp[..., 0]).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (pixels_of(palette)[0, 0] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_exif_orientation_is_applied(tmp_path, ramp, orientation, suffix, mode):
    pixels = ramp if mode == "RGB" else ramp[..., 0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", exif=exif, **lossless.get(suffix, {}))
    turned = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).swapaxes(0, 1),
        8: np.rot90(pixels),
    }.get(orientation, pixels)
    with (tmp_path / f"x.{suffix}").open("rb") as file:
        assert open_image(file, PHOTOGRAPHS).size == turned.shape[1::-1]
        file.seek(0)
        decoded = pixels_of(file, in_chans=len(mode))
    assert np.abs(decoded.astype(int) - turned).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize(("shrink", "scale"), [(0.5, 1), (1, 1), (1.9, 1), (2.1, 1 / 2), (7, 1 / 4), (99, 1 / 8)])
def test_jpegs_are_reduced_by_no_more_than_asked(tmp_path, photograph, shrink, scale):
    photograph(397, 477).save(tmp_path / "x.jpg")
    decoded = decode(open_image(tmp_path / "x.jpg", PHOTOGRAPHS).image, shrink)
    assert decoded.image.size == tuple(-(-side * scale // 1) for side in (397, 477))
    assert decoded.scale == pytest.approx(scale, rel=0.02)
    photograph(397, 477).save(tmp_path / "x.png")
    assert decode(open_image(tmp_path / "x.png", PHOTOGRAPHS).image, shrink).image.size == (397, 477)


def test_what_is_no_image_is_said_in_words():
    with pytest.raises(OSError, match="no image of a known format"):
        open_image(io.BytesIO(b"no picture"), PHOTOGRAPHS)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "4:4:0"])
def test_turbo_decodes_the_pixels_that_pillow_decodes(monkeypatch, subsampling):
    rng, sampled = np.random.default_rng(0), []
    for number, (height, width) in enumerate([(61, 83), (64, 64), (7, 130), (200, 33), (1, 1)]):
        smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize((width, height))
        smooth.save(buffer := io.BytesIO(), "JPEG", quality=60 + 9 * number, progressive=number % 2 == 1)
        sampled.append(buffer.getvalue())
        colours = subsampling.replace(":", "")
        sampled.append(simplejpeg.encode_jpeg(np.asarray(smooth), quality=60 + 9 * number, colorsubsampling=colours))
    view = RandomView((48, 32))
    for encoded in sampled:
        opened = photograph.opened(io.BytesIO(encoded))
        assert photograph.Photograph(opened, PHOTOGRAPHS)._decoded_by_turbo(3, 1.0) is not None
        for seed in range(5):
            by_turbo = view(io.BytesIO(encoded), np.random.default_rng(seed))
            with monkeypatch.context() as patch:
                patch.setattr(photograph, "simplejpeg", None)
                by_pillow = view(io.BytesIO(encoded), np.random.default_rng(seed))
            assert torch.equal(by_turbo, by_pillow)


def test_turbo_is_left_out_where_pillow_knows_better(monkeypatch):
    def turbo(image, shrink=1.0, in_chans=3):
        image.save(buffer := io.BytesIO(), "JPEG", **options)
        opened = photograph.opened(io.BytesIO(buffer.getvalue()))
        return photograph.Photograph(opened, PHOTOGRAPHS)._decoded_by_turbo(in_chans, shrink)

    options = {}
    colour = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 50).convert("RGB")
    assert turbo(colour) is not None
    assert turbo(colour, shrink=2.0) is None
    assert turbo(colour, in_chans=1) is None
    assert turbo(colour.convert("L")) is None
    assert turbo(colour.convert("CMYK")) is None
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif}
    assert turbo(colour) is None
    colour.save(buffer := io.BytesIO(), "JPEG")
    cut = io.BytesIO(buffer.getvalue()[:-300])
    with pytest.raises(OSError, match="truncated"):
        RandomView((48, 32))(cut, np.random.default_rng(0))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_crops_of_one_open_jpeg_do_not_depend_on_those_before(tmp_path, ramp, mode, orientation):
    """Also a fine crop after one that was decoded at a reduced scale."""
    exif = Image.Exif()
    exif[photograph.ORIENTATION] = orientation
    Image.fromarray(ramp).resize((800, 640)).convert(mode).save(tmp_path / "x.jpg", exif=exif, quality=95)
    boxes = [((0, 0, 640, 640), (64, 64)), ((100, 200, 164, 264), (64, 64)), ((0, 0, 640, 640), (32, 32))]
    with (tmp_path / "x.jpg").open("rb") as file:
        image = open_image(file, PHOTOGRAPHS)
        together = [image.resized_crop(*box) for box in boxes + boxes[::-1]]
    alone = []
    for box in boxes + boxes[::-1]:
        with (tmp_path / "x.jpg").open("rb") as file:
            alone.append(open_image(file, PHOTOGRAPHS).resized_crop(*box))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
def test_boxes_are_converted_as_whole_images_are(tmp_path, ramp, mode):
    rgb = Image.fromarray(ramp).resize((80, 60))
    image = rgb.quantize(40) if mode == "P" else rgb.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(rgb.convert("L"))
    image.save(tmp_path / "x.tiff" if mode == "CMYK" else tmp_path / "x.png", transparency=7 if mode == "P" else None)
    (path,) = tmp_path.iterdir()
    width, height = image.size
    for in_chans in (1, 3):
        reading = replace(PHOTOGRAPHS, in_chans=in_chans)
        whole = open_image(path, reading).resized_crop((0, 0, width, height), (height, width))
        box = open_image(path, reading).resized_crop((11, 7, 51, 37), (30, 40))
        assert torch.equal(box, whole[7:37, 11:51])
