"""The command `predict` with a segmentation model: a mask of each image of a source."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from sparse_fcmae.runtime.lock import LOCK, lock_folder
from sparse_fcmae.runtime.options import check_unused
from sparse_fcmae.weights.segmenter import SegmenterWeights, read_segmenter

SETTINGS = "masks.json"  # in the folders: how masks were made, and the classes of their values
MAP_SIDE = 1024  # pixels along the longer side of an image that a map shows


def predict_masks(config: PredictConfig) -> Path:
    """Writes a mask of each image into the folder `out`, and overlays into `maps` if asked to. Returns `out`.

    A mask is a PNG in the image's size with the values that the model was trained on. Masks that an earlier call with
    the same options has written are kept. Raises UserError for what the user can put right.
    """
    out, maps = check_folders(config)
    with process_group(config.device) as ranks:
        weights = read_segmenter(config.init)
        view = view_of(config, weights.encoder, ranks.device)
        images = ranks.main_first(lambda: by_page(open_images(config.data, config=config), view.reading))
        settings = settings_for("masks", weights.encoder, view, images, config)
        settings |= {"heads": digest_of(weights), "flips": config.flips}
        settings["classes"] = dict(zip(map(str, weights.classes.values), weights.classes.names, strict=True))
        folder, files = Masks(out, maps, settings), mask_files(images)
        model = weights.model(config.backend).to(ranks.device)
        lock = ranks.on_main(lambda: folder.begin(files, config.overwrite))
        missing = ranks.by_main(lambda: folder.missing(files))
        if ranks.main:
            there = f", where {earlier} are already" if (earlier := len(files) - len(missing)) else ""
            print("\n".join([*images.notes, f"masks of {len(missing)} images go to {out}{there}"]), flush=True)
        mine = missing[ranks.rank :: ranks.world]
        tiles = Tiles(Some(images, mine), None, view.size if view.native else None, view.reading)
        bad = list(tiles.left_out)
        description = "predicting" if ranks.main and len(tiles) else None
        found = segmented(tiles, range(len(tiles)), view, logits_by(model, config.flips), None, bad, description)
        written = 0
        with folder.said(files, ranks.main):
            for index, labels in stitched(found, tiles):
                file = files[mine[index]]
                if maps:
                    draw(images, mine[index], labels, view, weights.classes, maps / file)
                save_mask(out / file, weights.classes.mask(labels))
                written += 1
        written, bad = sum(ranks.gather(written)), together(ranks.gather(bad))
        if ranks.main:
            lock.close()
            if not written and len(missing) == len(files):
                raise UserError(f"no image of {images} is readable: {bad[0].name}: {bad[0].reason}")
            print(f"{out}: {written} masks" + (f", and {earlier} of an earlier call" if earlier else ""))
            say_unreadable(bad, out)
    return out


def check_folders(config: PredictConfig) -> tuple[Path, Path | None]:
    """The folders of masks and of maps. Raises UserError for options that can't be."""
    check_unused(config, ("windows", "top_k"), "is of a classifier: leave it out for a segmentation model")
    check_unused(config, ("crop_fraction",), "is of a classifier: a segmentation model sees whole images")
    if Path(config.out).suffix in TABLES:
        raise UserError(f"`out` {config.out}: a segmentation model writes a mask of each image, so name a folder")
    out, maps = Path(config.out).resolve(), Path(config.maps).resolve() if config.maps else None
    for option, folder in (("out", out), ("maps", maps)):
        if folder and folder.exists() and not folder.is_dir():
            raise UserError(f"`{option}` {folder} is a file: name a folder")
        if folder:
            check_apart(config.data, folder, option)
    if maps:
        check_installed("maps", "matplotlib", "matplotlib", "plots")
        if maps.is_relative_to(out) or out.is_relative_to(maps):
            raise UserError("`maps` and `out` lie in each other: name two folders")
    return out, maps


class Masks:
    """The folder of masks, and that of the pictures of them, if any.

    settings: what masks depend on. They are kept in SETTINGS in both folders, with the names of the files that are this
    command's, which alone it may replace.
    """

    def __init__(self, out: Path, maps: Path | None, settings: dict[str, Any]) -> None:
        self.folders = [out, *([maps] if maps else [])]
        self.settings = settings

    def begin(self, files: list[str], overwrite: bool) -> Any:
        """Makes the folders; returns what keeps other calls out of the first until it is closed.

        Raises UserError where one holds something else, and where it holds masks with other settings, which `overwrite`
        has removed.
        """
        for folder in self.folders:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(self.folders[0])
        try:
            for folder in self.folders:
                self._take(folder, files, overwrite)
        except BaseException:
            lock.close()
            raise
        return lock

    def _take(self, folder: Path, files: list[str], overwrite: bool) -> None:
        found = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else None
        ours = isinstance(found, dict) and found.get("format") == self.settings["format"]
        if not ours and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no masks of this command: choose another folder")
        before = {name: value for name, value in found.items() if name != "files"} if ours else None
        if before == self.settings and not (overwrite and doubt(self.settings)):
            return
        if ours and before != self.settings and not overwrite:
            other = differing(before, self.settings)
            raise UserError(f"{folder} holds masks with another {other}: give `overwrite=True`, or choose another")
        emptied: set[Path] = set()
        with writing(folder):
            for file in found.get("files", ()) if ours else ():
                if (folder / file).resolve().is_relative_to(folder):
                    (folder / file).unlink(missing_ok=True)
                    emptied.add((folder / file).parent)
            for path in sorted(emptied, key=lambda path: len(path.parts), reverse=True):
                remove_empty(path, folder)
        write_json(folder / SETTINGS, self.settings | {"files": files})

    @contextmanager
    def said(self, files: list[str], main: bool) -> Iterator[None]:
        """Has the main process say where an interruption leaves what was done."""
        try:
            yield
        except KeyboardInterrupt:
            if main:
                done = len(files) - len(self.missing(files))
                print(f"interrupted: {done} of {len(files)} masks are in {self.folders[0]}; the same command goes on")
            raise

    def missing(self, files: list[str]) -> list[int]:
        """The numbers of the images that are not done."""
        return [i for i, file in enumerate(files) if not all((folder / file).is_file() for folder in self.folders)]


def remove_empty(folder: Path, top: Path) -> None:
    """Removes a folder, and those above it that are empty without it, up to `top`, which stays."""
    while folder != top and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def mask_files(images: ImageSource) -> list[str]:
    """The paths of images' masks below a folder: those of the images, as .png.

    Where two would have the same, they keep the images' endings too.
    """
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
