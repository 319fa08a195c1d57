"""Images that the package draws itself, and a pretraining run on them that shows the whole path in minutes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import check, keywords_of, option, seed_option

SIDE = 64  # pixels
BATCH = 100
MARK = "demo.json"  # tells a demo's folder, which may be overwritten, from any other
SHAPES = ("disc", "square", "triangle", "star", "ring")
TEXTURES = ("stripes", "checks")
CLASSES = tuple(f"{texture}-{shape}" for shape in SHAPES for texture in TEXTURES)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of `sparse-fcmae demo`."""

    out: str = option("runs/demo", help="folder for the drawn images and the run", path=True)
    images: int = option(3000, help="images to draw", at_least=BATCH)
    epochs: int = option(10, help="passes over the images", above=0)
    seed: int = seed_option("of images, weights and masks")
    overwrite: bool = option(False, help="delete what an earlier demo left in `out` first")


def draw_image(label: int, seed: tuple[int, ...]) -> Image.Image:
    """An RGB picture of class CLASSES[label]: a textured shape of random place, size, turn and colours on a shaded
    background of another texture. The same for the same arguments."""
    rng = np.random.default_rng(seed)
    texture, shape = CLASSES[label].split("-")
    fore, back = _texture(texture, rng, contrast=160), _texture("waves", rng, contrast=60)
    mask = Image.new("L", (4 * SIDE, 4 * SIDE))
    centre, radius = rng.uniform(0.38, 0.62, 2) * 4 * SIDE, rng.uniform(0.24, 0.36) * 4 * SIDE
    draw, turn = ImageDraw.Draw(mask), rng.uniform(0, 2 * np.pi)
    if shape in ("disc", "ring"):
        for size, fill in ((1.0, 255), (0.5, 0))[: 1 + (shape == "ring")]:
            (x, y), r = centre, radius * size
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[shape]
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        reach = radius * np.where(np.arange(corners) % 2, 0.45, 1.15) if shape == "star" else radius * 1.15
        points = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * np.reshape(reach, (-1, 1))
        draw.polygon([tuple(p) for p in points], fill=255)
    mask = mask.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    shadow = mask.filter(ImageFilter.GaussianBlur(3)).point(lambda v: v // 2)
    picture = Image.composite(Image.new("RGB", (SIDE, SIDE)), back, shadow)
    picture.paste(fore, mask=mask)
    return picture


def _texture(kind: str, rng: np.random.Generator, contrast: float) -> Image.Image:
    """Two random colours mixed by a pattern of random period, turn and phase, under a linear gradient of light."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    turn, period = rng.uniform(0, np.pi), rng.uniform(5, 9)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    wave, other = (np.sin(2 * np.pi * (period * v + rng.uniform())) for v in (along, across))
    pattern = {"stripes": np.tanh(4 * wave), "checks": np.tanh(8 * wave * other), "waves": wave * 0.5}[kind]
    colour = rng.uniform(70, 185, 3)
    direction = rng.normal(size=3)
    shift = contrast * direction / np.linalg.norm(direction)
    light = (rng.uniform(-60, 60) * (x - 0.5) + rng.uniform(-60, 60) * (y - 0.5))[..., None]
    pixels = colour + pattern[..., None] * shift / 2 + light
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_images(folder: Path, count: int, seed: int) -> None:
    """Draws `count` PNG files into a folder a class, equally many of each."""
    from sparse_fcmae.runtime.files import new_folder, writing

    with new_folder(folder) as temporary, writing(folder):
        for name in CLASSES:
            (temporary / name).mkdir()
        for i in range(count):
            label = i % len(CLASSES)
            draw_image(label, (seed, i)).save(temporary / CLASSES[label] / f"{i:05d}.png", compress_level=1)


@keywords_of(DemoConfig)
def demo(options: dict[str, Any]) -> Path:
    """Draws images into OUT/images, pretrains on them in OUT/run; returns the folder of the exported encoder."""
    # imported here, as they load torch, which help does without
    from sparse_fcmae.runtime.files import write_json
    from sparse_fcmae.runtime.lock import lock_folder
    from sparse_fcmae.tasks.pretraining import pretrain

    config = DemoConfig(**options)
    check(config)
    out = Path(config.out)
    _check_folder(out, config.overwrite)
    with lock_folder(out):
        _check_folder(out, config.overwrite)  # once more, as another demo may have come first
        write_json(out / MARK, asdict(config))
        print(f"drawing {config.images} pictures of {len(CLASSES)} classes into {out / 'images'}")
        draw_images(out / "images", config.images, config.seed)
        exported = pretrain(
            data=out / "images",
            out=out / "run",
            overwrite=config.overwrite,
            model="atto",
            image_size=SIDE,
            stem_stride=2,
            batch_size=BATCH,
            epochs=config.epochs,
            lr=2e-3,
            save_every=max(1, config.images // BATCH * config.epochs // 4),
            seed=config.seed,
        )
    pictures = sorted((out / "run" / "reconstructions").glob("*.png"))
    print(f"what it learnt to fill in: {pictures[-1]}")
    return exported


def _check_folder(out: Path, overwrite: bool) -> None:
    """Makes the demo's folder. Raises UserError where it holds what is not to be replaced."""
    from sparse_fcmae.runtime.files import leftover_of, writing
    from sparse_fcmae.runtime.lock import LOCK

    with writing(out):
        if out.exists() and not out.is_dir():
            raise UserError(f"`out` {out} is a file: choose another")
        if out.is_dir() and not all(path.name == LOCK or leftover_of(path.name) == MARK for path in out.iterdir()):
            if not (out / MARK).is_file():
                raise UserError(f"`out` {out} is not empty and holds no demo: choose another")
            if not overwrite:
                raise UserError(f"`out` {out} holds an earlier demo: give `overwrite=True` to replace it")
        out.mkdir(parents=True, exist_ok=True)
