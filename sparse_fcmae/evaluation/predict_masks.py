"""The command `predict` with a segmentation model: a mask of each image of a source."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_fcmae.data.masks import MaskClasses, nearest
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.labelled import Some
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.data.sources.pages import by_page
from sparse_fcmae.evaluation.answer_tables import TABLES
from sparse_fcmae.evaluation.chunks import differing, doubt, settings_for
from sparse_fcmae.evaluation.config import PredictConfig
from sparse_fcmae.evaluation.overlays import picture_of, stitched
from sparse_fcmae.evaluation.plots import check_installed, draw_pixel_map
from sparse_fcmae.evaluation.run import FLIPS, EvaluationView, together, view_of
from sparse_fcmae.evaluation.samples import UNFIT, check_apart, say_unreadable
from sparse_fcmae.evaluation.tiles import Tiles, segmented
from sparse_fcmae.model.segmenter import Segmenter
from sparse_fcmae.runtime.distributed import process_group
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json, write_atomic, write_json, writing
from sparse_fcmae.weights.segmenter import SegmenterWeights, read_segmenter

SETTINGS = "masks.json"  # in the folder: how its masks were made, and the classes of their values
MAP_SIDE = 1024  # pixels along the longer side of an image that a map shows


def predict_masks(config: PredictConfig) -> Path:
    """Writes a mask of each image into the folder `out`, and overlays into `maps` if asked to. Returns `out`.

    A mask is a PNG in the image's size with the values that the model was trained on. Masks that an earlier call with
    the same options has written are kept. Raises UserError for what the user can put right.
    """
    out = check_folders(config)
    with process_group(config.device) as ranks:
        weights = read_segmenter(config.init)
        view = view_of(config, weights.encoder, ranks.device)
        images = ranks.main_first(lambda: by_page(open_images(config.data, config=config), view.reading))
        settings = settings_for("masks", weights.encoder, view, images, config)
        settings |= {"heads": digest_of(weights), "flips": config.flips, "maps": config.maps}
        files = mask_files(images)
        missing = ranks.by_main(lambda: begin(out, settings, weights.classes, files, config.overwrite))
        if ranks.main:
            print("\n".join([*images.notes, f"masks of {len(missing)} images go to {out}"]), flush=True)
        mine = missing[ranks.rank :: ranks.world]
        tiles = Tiles(Some(images, mine), None, view.size if view.native else None, view.reading)
        bad, model = list(tiles.left_out), weights.model(config.backend).to(ranks.device)
        found = segmented(
            tiles,
            range(len(tiles)),
            view,
            logits_by(model, config.flips),
            None,
            bad,
            "predicting" if ranks.main else None,
        )
        written = 0
        for index, labels in stitched(found, tiles):
            save_mask(out / files[mine[index]], weights.classes.mask(labels))
            if config.maps:
                draw(images, mine[index], labels, view, weights.classes, Path(config.maps) / files[mine[index]])
            written += 1
        counts, bad = ranks.gather(written), together(ranks.gather(bad))
        if ranks.main:
            if missing and not sum(counts):
                raise UserError(f"no image of {images} is readable: {bad[0].name}: {bad[0].reason}")
            print(
                f"{out}: {sum(counts)} masks"
                + (f", and {len(files) - len(missing)} of an earlier call" if len(missing) < len(files) else "")
            )
            say_unreadable(list(dict.fromkeys(bad)), out)
    return out


def check_folders(config: PredictConfig) -> Path:
    """The folder to write to. Raises UserError for options that can't be."""
    if config.windows or config.top_k != PredictConfig.top_k:
        raise UserError("`windows` and `top_k` are of a classifier: leave them out for a segmentation model")
    out = Path(config.out)
    if out.suffix in TABLES:
        raise UserError(f"`out` {out}: a segmentation model writes a mask of each image, so name a folder")
    for option, folder in (("out", out), ("maps", Path(config.maps or out))):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"`{option}` {folder} is a file: name a folder")
        check_apart(config.data, folder)
    if config.maps:
        check_installed("maps", "matplotlib", "matplotlib", "plots")
        if Path(config.maps).resolve() == out.resolve():
            raise UserError("`maps` and `out` are the same folder: name two")
    return out


def begin(out: Path, settings: dict[str, Any], classes: MaskClasses, files: list[str], overwrite: bool) -> list[int]:
    """Makes the folder, and returns the numbers of the images whose masks are not in it yet.

    Raises UserError where it holds something else, such as masks of other weights, unless it may be overwritten.
    """
    named = {"classes": dict(zip(map(str, classes.values), classes.names, strict=True)), **settings}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    before = read_json(out / SETTINGS) if (out / SETTINGS).exists() else None
    if before is None and any(out.iterdir()):
        raise UserError(f"`out` {out} is not empty and holds no masks of this command: choose another")
    if before == named and not (overwrite and doubt(settings)):
        return [number for number, file in enumerate(files) if not (out / file).is_file()]
    if before is not None and before != named and not overwrite:
        raise UserError(f"`out` {out} holds masks with another {differing(before, named)}: give `overwrite=True`")
    for file in files:
        (out / file).unlink(missing_ok=True)
    write_json(out / SETTINGS, named)
    return list(range(len(files)))


def mask_files(images: ImageSource) -> list[str]:
    """The paths of images' masks below a folder: those of the images, as .png, and with their own endings where two
    would have the same."""
    names = [images.name(index) for index in range(len(images))]
    parts = [[UNFIT.sub("-", part) for part in name.split(os.sep) if part not in ("", ".", "..")] for name in names]
    paths = [os.path.join(*part) if part else str(number) for number, part in enumerate(parts)]
    stems = [os.path.splitext(path)[0] for path in paths]
    often = Counter(stems)
    files = [f"{stem if often[stem] == 1 else path}.png" for stem, path in zip(stems, paths, strict=True)]
    often = Counter(files)
    return [file if often[file] == 1 else f"{number}-{file.replace(os.sep, '-')}" for number, file in enumerate(files)]


def digest_of(weights: SegmenterWeights) -> str:
    """A digest of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def logits_by(model: Segmenter, flips: str | None) -> Callable[[Tensor], Tensor]:
    """What makes the logits of normalised images: the mean over the images and their flips, turned back."""

    def logits(images: Tensor) -> Tensor:
        outputs = [
            model(images.flip(axes)).float().flip(axes) if axes else model(images).float() for axes in FLIPS[flips]
        ]
        return torch.stack(outputs).mean(0)

    return logits


def save_mask(path: Path, mask: np.ndarray) -> None:
    """Writes a mask, uint8 or uint16 [H, W], as PNG."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda p: Image.fromarray(mask).save(p, format="PNG"))


def draw(
    images: ImageSource, index: int, labels: np.ndarray, view: EvaluationView, classes: MaskClasses, path: Path
) -> None:
    """Draws an image beside its classes."""
    picture = picture_of(images, index, view.reading, view.form, MAP_SIDE)
    height, width = labels.shape
    small = nearest(labels, (0, 0, width, height), picture.shape[:2])
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    draw_pixel_map(picture, small, classes.names, images.name(index), path)
