"""The command `reconstruct`."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from sparse_fcmae import UserError, load_fcmae, pretrain
from sparse_fcmae.cli import main
from sparse_fcmae.evaluation.reconstruct import MOST_PIXELS, draw_reconstructions

SMALL = {"image_size": 32, "stem_stride": 1, "batch_size": 4, "dtype": "fp32", "num_workers": 0}


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """A run of three steps, each of which has a checkpoint."""
    out = tmp_path_factory.mktemp("run") / "run"
    pretrain(data=pictures, out=out, max_steps=3, save_every=1, **SMALL)
    return out


def tiles(path, rows):
    """The pictures on a sheet in four columns with names above its rows: [rows, 4, 32, 32, 3]."""
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert sheet.shape == (18 + rows * 114, 4 + 4 * 100, 3)
    return np.stack(
        [
            np.stack([sheet[32 + 114 * row :, 4 + 100 * column :][1:96:3, 1:96:3] for column in range(4)])
            for row in range(rows)
        ]
    )


def hidden_patches(masked):
    return (masked.reshape(4, 8, 4, 8, 3) == 128).all((1, 3, 4))


def test_rows_for_images_and_masks(run, pictures, tmp_path, capsys):
    main(
        f"reconstruct --init {run} --data {pictures} --out {tmp_path / 'a.png'} --images 2 --masks 3 --batch-size 4 "
        "--dtype fp32 --num-workers 0 --mask-ratio 0.25 --seed 5".split()
    )
    found = tiles(tmp_path / "a.png", 6)
    masks = [hidden_patches(row[1]) for row in found]
    assert [mask.sum() for mask in masks] == [4] * 6
    assert len({mask.tobytes() for mask in masks}) > 3
    assert all(np.array_equal(found[0, 0], row[0]) for row in found[:3])
    assert not np.array_equal(found[0, 0], found[3, 0])
    said = capsys.readouterr().out
    assert "a.png: 6 rows; the loss on what is hidden is " in said
    model = load_fcmae(run)
    model.mask_ratio = 0.25
    files = sorted(pictures.rglob("*.png"))
    images = model.encoder.preprocess([files[0], files[-1]]).repeat_interleave(3, 0)
    with torch.no_grad():
        loss = model(images, model.draw_mask(6, (32, 32), generator=torch.Generator().manual_seed(5))).loss
    assert f"hidden is {loss:.4f}" in said


def test_a_mask_that_is_painted(run, pictures, tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[:10, 12:28] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = {"init": run, "data": pictures, "images": 2, "dtype": "fp32", "num_workers": 0}
    draw_reconstructions(out=tmp_path / "a.png", mask=tmp_path / "mask.png", **options)
    for row in tiles(tmp_path / "a.png", 2):
        assert hidden_patches(row[1]).nonzero()[1].tolist() == [1, 2]
        assert np.array_equal(row[3][8:], row[0][8:])
    for value, message in ((255, "hides all patches"), (0, "hides no patch")):
        Image.new("L", (9, 9), value).save(tmp_path / "mask.png")
        with pytest.raises(UserError, match=message):
            draw_reconstructions(out=tmp_path / "b.png", mask=tmp_path / "mask.png", **options)
    with pytest.raises(UserError, match="`mask` is one mask: leave"):
        draw_reconstructions(out=tmp_path / "b.png", mask=tmp_path / "mask.png", masks=2, **options)
    (tmp_path / "mask.png").write_text("no picture")
    with pytest.raises(UserError, match="can't be read"):
        draw_reconstructions(out=tmp_path / "b.png", mask=tmp_path / "mask.png", **options)
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_an_animation_over_the_checkpoints(run, pictures, tmp_path, ending):
    options = {"init": run, "data": pictures, "images": 2, "dtype": "fp32", "num_workers": 0}
    path = draw_reconstructions(out=tmp_path / f"a.{ending}", **options)
    frames = Image.open(path)
    assert frames.n_frames == 3
    seen = []
    for number in range(3):
        frames.seek(number)
        seen.append(np.asarray(frames.convert("RGB")).astype(int))
    originals = [frame[32:128, 4:100] for frame in seen]
    assert np.abs(originals[0] - originals[2]).mean() < 8  # but for what the format loses
    assert not np.array_equal(seen[0], seen[2])
    with pytest.raises(
        UserError, match=f"rows of pixels, and .{ending} at most {MOST_PIXELS['.' + ending]}: give `out`"
    ):
        draw_reconstructions(out=tmp_path / f"b.{ending}", masks=600, **options | {"images": 1})
    assert not (tmp_path / f"b.{ending}").exists()
    with pytest.raises(UserError, match="has 0 checkpoints, too few for an animation: give `out`"):
        draw_reconstructions(out=tmp_path / f"b.{ending}", **options | {"init": run / "exported"})


def test_channels_of_sixteen_bits_in_false_colours(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "stacks").mkdir()
    for number in range(8):
        values = rng.integers(100, 4000, (5, 32, 32)) * np.array([1, 2, 3, 4, 5])[:, None, None]
        tifffile.imwrite(tmp_path / "stacks" / f"{number}.tif", values.astype(np.uint16), photometric="minisblack")
    run = tmp_path / "run"
    pretrain(data=tmp_path / "stacks", out=run, pages="channels", max_steps=1, norm_pix_loss=False, **SMALL)
    options = {"init": run, "data": tmp_path / "stacks", "images": 1, "dtype": "fp32", "num_workers": 0}
    options |= {"pages": "channels", "overwrite": True, "out": tmp_path / "a.png"}
    values = tifffile.imread(tmp_path / "stacks" / "0.tif").astype(float)
    low, high = np.quantile(values, (0.01, 0.99), axis=(1, 2), keepdims=True)
    shown = (255 * ((values - low) / (high - low)).clip(0, 1)).transpose(1, 2, 0)
    for show, channels in (("5,1,2", (4, 0, 1)), ("3", (2, 2, 2)), ("2,4", (3, 1, 3)), (None, (0, 1, 2))):
        draw_reconstructions(show=show, **options)
        assert np.abs(tiles(tmp_path / "a.png", 1)[0, 0] - shown[..., channels]).max() < 2
    for show in ("6", "0", "1,2,3,4", "red"):
        with pytest.raises(UserError, match="`show`"):
            draw_reconstructions(show=show, **options)


def test_mistakes(run, pictures, tmp_path):
    options = {"init": run, "data": pictures, "num_workers": 0}
    with pytest.raises(UserError, match=r"must end in .png, .gif or .webp"):
        draw_reconstructions(out=tmp_path / "a.jpg", **options)
    with pytest.raises(UserError, match="no decoder: name a run of `pretrain`"):
        draw_reconstructions(out=tmp_path / "a.png", **options | {"init": run / "exported"})
    with pytest.raises(UserError, match="keeps no patch"):
        draw_reconstructions(out=tmp_path / "a.png", mask_ratio=0.99, **options)
    with pytest.raises(UserError, match="lies among the images"):
        draw_reconstructions(out=pictures / "a.png", **options)
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(UserError, match="exists: choose another or give `overwrite=True`"):
        draw_reconstructions(out=tmp_path / "a.png", **options)
    assert (tmp_path / "a.png").read_text() == "mine"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"no image of .* is readable"):
        draw_reconstructions(out=tmp_path / "b.png", **options | {"data": tmp_path / "images"})
    for number, file in enumerate(sorted(pictures.rglob("*.png"))[:2]):
        Image.open(file).save(tmp_path / "images" / f"{number + 1}.png")
    draw_reconstructions(out=tmp_path / "b.png", **options | {"data": tmp_path / "images"})
    assert "0.png" in (tmp_path / "b.png.unreadable.txt").read_text()
