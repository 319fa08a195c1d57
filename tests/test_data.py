import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks import data as bench
from sparse_fcmae.data import (
    AugmentedImages,
    ImageFolder,
    centre_crop_box,
    load_crop,
    make_loader,
    micro_batches,
    normalise,
    random_crop_box,
)

PHOTOGRAPHS = os.environ.get("SPARSE_FCMAE_IMAGES", "")  # a folder of photographs, for one more test
RAMP = np.linspace(0, 255, 40 * 30 * 3).astype(np.uint8).reshape(30, 40, 3)


def photograph(width, height, seed=0):
    """Noise with the spectrum of photographs, whose amplitudes fall as one over the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency
    values = np.fft.irfft2(spectrum, (height, width))
    values = 127 + 50 * values / values.std()
    return Image.fromarray(values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_folder_lists_every_depth_in_a_fixed_order(tmp_path):
    image = Image.fromarray(RAMP)
    for name in ("b.PNG", "a/z.jpg", "a/deep/er/x.webp", "c.tiff", "d.bmp", "e.gif", ".hidden.png", ".cache/f.png"):
        save(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("not an image")
    folder = ImageFolder(tmp_path)
    assert folder.files == ["a/deep/er/x.webp", "a/z.jpg", "b.PNG", "c.tiff", "d.bmp", "e.gif"]
    assert folder.fingerprint == ImageFolder(tmp_path).fingerprint
    (tmp_path / "c.tiff").unlink()
    assert folder.fingerprint != ImageFolder(tmp_path).fingerprint


def test_folder_lists_linked_folders_once(tmp_path):
    save(tmp_path / "data" / "a" / "x.png", Image.fromarray(RAMP))
    save(tmp_path / "elsewhere" / "y.png", Image.fromarray(RAMP))
    save(tmp_path / "data" / "run" / "z.png", Image.fromarray(RAMP))
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    folder = ImageFolder(tmp_path / "data", without=tmp_path / "data" / "run")
    assert folder.files == ["a/x.png", "link/y.png"]


def test_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ImageFolder(tmp_path / "missing")
    with pytest.raises(UserError, match="no image files"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "gif"])
def test_formats(tmp_path, suffix):
    save(tmp_path / f"x.{suffix}", Image.fromarray(RAMP), **({"quality": 100} if suffix in ("jpg", "webp") else {}))
    with Image.open(tmp_path / f"x.{suffix}") as image:
        pixels = load_crop(image, (30, 40), 3)
    assert pixels.shape == (30, 40, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - RAMP).mean() < 8


def crop_of(image, in_chans=3):
    return load_crop(image, (image.size[1], image.size[0]), in_chans)


def test_modes():
    rgb = Image.fromarray(RAMP)
    for mode in ("L", "1", "P", "CMYK", "YCbCr", "LA", "La", "HSV", "I", "F"):
        assert crop_of(rgb.convert(mode)).shape == (30, 40, 3), mode
        assert crop_of(rgb.convert(mode), in_chans=1).shape == (30, 40, 1), mode
    assert np.array_equal(crop_of(rgb), RAMP)


def test_transparent_pixels_become_white():
    rgba = np.dstack([np.zeros_like(RAMP), np.full((30, 40), 255, np.uint8)])
    rgba[:, :20, 3] = 0
    pixels = crop_of(Image.fromarray(rgba))
    assert (pixels[:, :20] == 255).all()
    assert (pixels[:, 20:] == 0).all()
    palette = Image.fromarray(RAMP[..., 0]).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (crop_of(palette)[0, 0] == 255).all()


def test_sixteen_bits_keep_their_range(tmp_path):
    values = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    for suffix in ("png", "tiff"):
        save(tmp_path / f"x.{suffix}", Image.fromarray(values))
        with Image.open(tmp_path / f"x.{suffix}") as image:
            assert np.array_equal(crop_of(image, in_chans=1)[..., 0], values >> 8)
    small = Image.fromarray(np.arange(240, dtype=np.int32).reshape(12, 20))
    assert np.array_equal(crop_of(small, in_chans=1)[..., 0], np.asarray(small))
    stretched = crop_of(Image.fromarray(np.linspace(-1, 3, 1200).astype(np.float32).reshape(30, 40)), in_chans=1)
    assert (stretched.min(), stretched.max()) == (0, 255)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossy = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    save(tmp_path / f"x.{suffix}", Image.fromarray(RAMP), exif=exif, **lossy.get(suffix, {}))
    turned = [
        *(RAMP, RAMP[:, ::-1], RAMP[::-1, ::-1], RAMP[::-1]),
        *(RAMP.transpose(1, 0, 2), np.rot90(RAMP, -1), np.rot90(RAMP, 2).transpose(1, 0, 2), np.rot90(RAMP)),
    ][orientation - 1 if orientation < 9 else 0]
    with Image.open(tmp_path / f"x.{suffix}") as image:
        pixels = load_crop(image, turned.shape[:2], 3)
    assert np.abs(pixels.astype(int) - turned).max() <= (3 if suffix == "jpg" else 0)


def test_jpeg_decoded_at_a_reduced_scale_is_nearly_the_same(tmp_path):
    y, x = np.mgrid[:600, :800] / 40
    smooth = (127 + 60 * np.sin(x)[..., None] * np.cos(y)[..., None] * [1, 0.5, -1]).astype(np.uint8)
    save(tmp_path / "x.jpg", Image.fromarray(smooth), quality=95)
    expected = np.asarray(Image.fromarray(smooth).resize((80, 60), Image.Resampling.BICUBIC)).astype(int)
    with Image.open(tmp_path / "x.jpg") as image:
        pixels = load_crop(image, (60, 80), 3)
        assert image.size < (800, 600)
    assert np.abs(pixels - expected).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_scale_keeps_pixels_in_place(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "x.jpg", photograph(477, 397), exif=exif, quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        whole = ImageOps.exif_transpose(image)
    box = centre_crop_box(*whole.size, 1)
    expected = np.asarray(whole.crop(box).resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    with Image.open(tmp_path / "x.jpg") as image:
        pixels = load_crop(image, (24, 24), 3)
        assert max(image.size) == 60
    assert np.abs(pixels - expected).mean() < 1.5


def differences_to_torchvision(folder, size, count):
    """Mean absolute differences, of 255, of the first crops of a folder from torchvision's of the same boxes."""
    resized_crop = pytest.importorskip("torchvision.transforms.functional").resized_crop
    mode = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    folder = ImageFolder(folder)
    for index in range(min(count, len(folder))):
        with folder.open(index) as image:
            whole = image.convert("RGB")
        rng = np.random.default_rng(index)
        (left, top, right, bottom), flip = random_crop_box(*whole.size, rng), rng.random() < 0.5
        crop = resized_crop(whole, top, left, bottom - top, right - left, [size, size], mode, antialias=True)
        expected = np.asarray(crop)[:, ::-1] if flip else np.asarray(crop)
        with folder.open(index) as image:
            pixels = load_crop(image, (size, size), 3, np.random.default_rng(index))
        yield np.abs(pixels.astype(int) - expected).mean()


@pytest.mark.parametrize("size", [224, 40])
def test_crops_are_those_of_torchvision(tmp_path, size):
    for i in range(8):
        save(tmp_path / f"{i}.jpg", photograph(501, 377, i), quality=90)
    assert max(differences_to_torchvision(tmp_path, size, 8)) < 1.5


@pytest.mark.skipif(not PHOTOGRAPHS, reason="SPARSE_FCMAE_IMAGES names no folder of photographs")
@pytest.mark.parametrize("size", [224, 64])
def test_crops_of_photographs_are_those_of_torchvision(size):
    assert np.mean(list(differences_to_torchvision(PHOTOGRAPHS, size, 64))) < 1.5


def test_random_crops_have_the_stated_distribution():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(640, 480, rng) for _ in range(4000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    area, ratio = width * height / (640 * 480), width / height
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [640, 480]).all()
    assert 0.19 < area.min() < 0.22
    assert area.max() > 0.95
    assert 0.74 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.35
    small = np.array([np.log(ratio[area < 0.5])])
    assert abs(small.mean()) < 0.02


def test_random_crops_are_uniform():
    rng = np.random.default_rng(0)
    side, low, high = 10_000, np.log(3 / 4), np.log(4 / 3)
    boxes = np.array([random_crop_box(side, side, rng) for _ in range(8000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    fits = width * height < 0.75 * side**2  # of any ratio, so that none of these was rejected
    left, top, width, height = boxes[fits, 0], boxes[fits, 1], width[fits], height[fits]
    shares = {
        "area": (width * height / side**2 - 0.2) / 0.55,
        "ratio": (np.log(width / height) - low) / (high - low),
        "left": left / (side - width),
        "top": top / (side - height),
    }
    count = fits.sum()
    for name, values in shares.items():  # Kolmogorov and Smirnov's test, at the level 0.001
        steps, values = np.arange(count + 1) / count, np.sort(values)
        assert max((steps[1:] - values).max(), (values - steps[:-1]).max()) < 1.95 / count**0.5, name
    assert np.abs(np.corrcoef(list(shares.values())) - np.eye(4)).max() < 4 / count**0.5


def test_extreme_shapes_fall_back_to_a_centred_crop():
    rng = np.random.default_rng(0)
    assert random_crop_box(1000, 10, rng) == (493, 0, 506, 10)
    assert random_crop_box(10, 1000, rng) == (0, 493, 10, 506)
    assert random_crop_box(1, 1, rng) == (0, 0, 1, 1)


def test_samples_depend_on_seed_epoch_and_index_alone(pictures):
    first, again, other = (AugmentedImages(ImageFolder(pictures), (32, 32), 3, seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0, 5][0], again[0, 5][0])
    for key in ((1, 5), (0, 6)):
        assert not np.array_equal(first[0, 5][0], first[key][0])
    assert not np.array_equal(first[0, 5][0], other[0, 5][0])


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


def test_loader_gives_the_same_batches_on_any_number_of_workers(pictures):
    dataset = AugmentedImages(ImageFolder(pictures), (16, 24), 1, 0)
    batches = [
        list(make_loader(dataset, micro_batches(40, 8, range(3), 0, 0, 1, 8), workers, pin_memory=False))
        for workers in (0, 2)
    ]
    for a, b in zip(*batches, strict=True):
        assert a.pixels.shape == (8, 16, 24, 1)
        assert torch.equal(a.pixels, b.pixels)


def test_unreadable_files_are_named_and_replaced(tmp_path, pictures):
    (tmp_path / "broken.png").write_text("no picture")
    save(tmp_path / "good.png", Image.fromarray(RAMP))
    dataset = AugmentedImages(ImageFolder(tmp_path), (16, 16), 3, 0)
    pixels, index, bad = dataset[0, 0]
    assert pixels.shape == (16, 16, 3)
    assert dataset.folder.files[index] == "good.png"
    assert {entry.file for entry in bad} == {"broken.png"}
    (tmp_path / "good.png").write_text("no picture either")
    assert dataset[0, 0][0] is None


def test_normalise():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    out = normalise(pixels)
    assert out.shape == (1, 3, 1, 1)
    expected = [(0 / 255 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (255 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))


def bench_rows(folder, **options):
    rows = bench.data(data=str(folder), image_size="32x48", images=20, rounds=1, **options)
    return {row["candidate"]: row for row in rows}


def test_bench_data_compares_with_torchvision(capsys, tmp_path, pictures):
    pytest.importorskip("torchvision")
    threads = torch.get_num_threads()
    rows = bench_rows(pictures, json=str(tmp_path / "rows.json"))
    assert list(rows) == ["sparse-fcmae", "torchvision v1", "torchvision v2"]
    assert all(row["ours_over_it"] > 0 and row["images"] == 20 for row in rows.values())
    assert rows["sparse-fcmae"]["difference"] < 1.5
    assert rows["sparse-fcmae"]["ours_over_it"] == 1
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["rows"] == list(rows.values())
    assert written["environment"]["threads"] == 1
    assert torch.get_num_threads() == threads
    assert "images/s" in capsys.readouterr().out


def test_bench_data_candidates_give_batches_alike(pictures):
    pytest.importorskip("torchvision")
    with ImageFolder(pictures).open(0) as image:
        ours = normalise(torch.from_numpy(load_crop(image, (32, 48), 3, np.random.default_rng(0))[None]))
        for make in bench.CANDIDATES.values():
            theirs = make((32, 48))(image.convert("RGB"))
            assert (theirs.shape, theirs.dtype) == (ours.shape[1:], ours.dtype)
            assert theirs.abs().max() < 3


def test_bench_data_without_torchvision(capsys, monkeypatch, tmp_path, pictures):
    class Without:
        def find_spec(self, name, *_):
            if name == "torchvision":
                raise ModuleNotFoundError(name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(), *sys.meta_path])
    save(tmp_path / "broken.jpg", Image.fromarray(RAMP))
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "broken.jpg").read_bytes()[:-200])
    (tmp_path / "pictures").symlink_to(pictures)
    rows = bench_rows(tmp_path)
    for name in ("torchvision v1", "torchvision v2"):
        assert rows[name]["refused"] == "torchvision is not installed: pip install torchvision"
        assert "images_per_second" not in rows[name]
    ours = rows["sparse-fcmae"]
    assert (ours["images"], ours["unreadable"]) == (19, 1)
    assert ours["difference"] < 1.5
    assert ours["images_per_second"] > 0
    assert "is not installed" in capsys.readouterr().out


def test_bench_data_refuses_wrong_pixels(monkeypatch, pictures):
    monkeypatch.setattr(bench, "load_crop", lambda *args: 255 - load_crop(*args))
    ours = bench_rows(pictures)["sparse-fcmae"]
    assert "its pixels differ" in ours["refused"]
    assert "images_per_second" not in ours


def test_bench_data_wrong_options(tmp_path, pictures):
    with pytest.raises(UserError, match="no such folder"):
        bench.data(data=str(tmp_path / "none"))
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(UserError, match="none of the first 1 images can be read"):
        bench.data(data=str(tmp_path))
    for options in ({"images": 0}, {"rounds": 0}, {"seed": -1}, {"image_size": "0"}, {"image_size": "big"}):
        with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')}"):
            bench.data(data=str(pictures), **options)
