"""Satellite scenes of many bands: what a model fills in, beside what interpolation fills in.

    python examples/satellite.py --scenes SCENES --held-out scene-4.npy --out runs/satellite

The folder SCENES holds scenes as .npy files [height, width, bands]. All but the held-out one are pretrained on, in
windows of their own resolution. Then 10 of the 16 patches are hidden in each window of the held-out scene, several
times. What the model makes of them is compared with the mean of the visible pixels, and with linear interpolation
between them. The table has the root of the mean squared error of each band, in the scenes' own units. It needs scipy.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

from sparse_fcmae import load_fcmae, pretrain
from sparse_fcmae.evaluation.sheet import sheet
from sparse_fcmae.model.fcmae import unpatchify

SIZE = 32  # pixels of a window, whose patches have 8 with a stem of stride 1
SHOWN = 6  # windows in the picture


def windows(scene: np.ndarray) -> np.ndarray:
    """The windows that tile a scene [H, W, C] from its upper left corner on: [N, 32, 32, C]."""
    rows, cols = (side // SIZE for side in scene.shape[:2])
    tiles = scene[: rows * SIZE, : cols * SIZE].reshape(rows, SIZE, cols, SIZE, -1)
    return tiles.swapaxes(1, 2).reshape(rows * cols, SIZE, SIZE, -1)


def by_mean(window: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """The mean of each band's visible pixels everywhere: [H, W, C] of a window [H, W, C] and bool [H, W]."""
    return np.broadcast_to(window[~hidden].mean(0), window.shape)


def by_interpolation(window: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Each band linear between the visible pixels, and beyond them as the nearest one: [H, W, C]."""
    places, seen = np.argwhere(~hidden), window[~hidden]
    every = np.argwhere(np.ones_like(hidden))
    filled = LinearNDInterpolator(places, seen)(every)
    outside = np.isnan(filled[:, 0])
    filled[outside] = NearestNDInterpolator(places, seen)(every[outside])
    return filled.reshape(window.shape)


@torch.no_grad()
def by_model(model: torch.nn.Module, tiles: np.ndarray, masks: torch.Tensor) -> np.ndarray:
    """What the model predicts of all pixels, in the scene's units: [N, 32, 32, C]."""
    form = model.encoder.transform.form
    prediction = model(form.normalise(torch.from_numpy(tiles)), masks).prediction.float()
    images = unpatchify(prediction, model.patch_size, masks.shape[1:])
    return form.restore(images).permute(0, 2, 3, 1).numpy()


def main(words: list[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the errors of each way to fill in, one a band."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True, help="folder of .npy files [height, width, bands]")
    parser.add_argument("--held-out", required=True, help="the one of them that is not trained on")
    parser.add_argument("--out", default="runs/satellite", help="run folder")
    parser.add_argument("--epochs", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--masks", type=int, default=8, help="of each window")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--bands", default="4,3,2", help="shown as red, green and blue, counted from 1")
    given = parser.parse_args(words)

    held_out = given.scenes / given.held_out
    scene = np.load(held_out)
    others = [str(path) for path in sorted(given.scenes.glob("*.npy")) if path.resolve() != held_out.resolve()]
    pretrain(
        data=tuple(others),
        out=given.out,
        crop="native",
        rotate=True,
        image_size=SIZE,
        stem_stride=1,
        norm_pix_loss=False,  # so that patches are predicted with their own means and deviations
        epochs=given.epochs,
        batch_size=given.batch_size,
        lr=1e-3,
        seed=given.seed,
        resume="auto",
    )
    model, tiles = load_fcmae(given.out), windows(scene)
    tiles = np.concatenate([tiles] * given.masks)
    masks = model.draw_mask(len(tiles), (SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    hidden = masks.repeat_interleave(model.patch_size, 1).repeat_interleave(model.patch_size, 2).numpy()
    pairs = list(zip(tiles, hidden, strict=True))
    filled = {
        "mean": np.stack([by_mean(*pair) for pair in pairs]),
        "interpolation": np.stack([by_interpolation(*pair) for pair in pairs]),
        "model": by_model(model, tiles, masks),
    }
    errors = {name: np.sqrt(((guess - tiles)[hidden] ** 2).mean(0)) for name, guess in filled.items()}
    print("band  deviation  " + "  ".join(f"{name:>13}" for name in errors))
    for band, deviation in enumerate(tiles[hidden].std(0)):
        print(f"{band + 1:4}  {deviation:9.4f}  " + "  ".join(f"{error[band]:13.4f}" for error in errors.values()))
    bands = [int(band) - 1 for band in given.bands.split(",")]
    light = np.percentile(scene[..., bands], 99, (0, 1))
    shown = {"scene": tiles, "hidden": np.where(hidden[..., None], 0, tiles)}
    shown |= {name: np.where(hidden[..., None], filled[name], tiles) for name in ("interpolation", "model")}
    columns = {name: (255 * (of[:SHOWN, ..., bands] / light).clip(0, 1)).astype(np.uint8) for name, of in shown.items()}
    sheet(columns).save(Path(given.out) / "filled-in.png")
    return errors


if __name__ == "__main__":
    main()
