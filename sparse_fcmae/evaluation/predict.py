"""The command `predict`: what a classifier says of each image of a source, in a table."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.evaluation.answer_tables import TABLES, Row, answer, write_table
from sparse_fcmae.evaluation.chunks import Chunks, settings_for
from sparse_fcmae.evaluation.config import PredictConfig
from sparse_fcmae.evaluation.pictures import rgb, shown
from sparse_fcmae.evaluation.plots import check_installed, draw_class_map
from sparse_fcmae.evaluation.predict_masks import predict_masks
from sparse_fcmae.evaluation.run import FLIPS, EvaluationView, check_any, view_of
from sparse_fcmae.evaluation.samples import UNFIT, Samples, check_apart, check_ending, say_unreadable
from sparse_fcmae.model.classifier import Classifier
from sparse_fcmae.runtime.distributed import process_group
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import check_writable, writing
from sparse_fcmae.runtime.options import check, check_given, check_paths, check_unused, keywords_of
from sparse_fcmae.weights.read import read_weights
from sparse_fcmae.weights.segmenter import holds_segmenter

MAP_SIDE = 1024  # pixels along the longer side of an image that a map of classes shows


class Answered(NamedTuple):
    """An image, or a window of one: its place among the samples, its logits [K], and the windows that they are of."""

    sample: int
    logits: Tensor
    boxes: np.ndarray | None
    of_windows: Tensor


@keywords_of(PredictConfig)
def predict(options: dict[str, Any]) -> Path:
    """Writes what a model says of images: a classifier's answers into a table, masks of each by a segmentation model.

    Maps of classes are drawn if asked for. What was computed before a call was killed is kept, and the same call goes
    on from there. Returns the table, or the folder of masks. Raises UserError for what the user can put right.
    """
    check_paths(PredictConfig, options)
    check_given(options, {"data": "the images", "init": "the weights", "out": "the table"})
    config = PredictConfig(**options)
    check(config)
    return predict_masks(config) if holds_segmenter(config.init) else predict_classes(config)


def predict_classes(config: PredictConfig) -> Path:
    """Writes what a classifier says of images into a table, a row each, and returns that."""
    weights = read_weights(config.init).per_image()
    if not weights.num_classes:
        raise UserError(f"{config.init} has no classification head: fine-tune it first, or `embed` its features")
    out = check_table(config)
    with process_group(config.device) as ranks:
        classes = weights.classes or tuple(map(str, range(weights.num_classes)))
        view = view_of(config, weights, ranks.device)
        if weights.task != "classification":
            check_unused(config, ("maps", "top_k"), "is of models that give an image one class: leave it out")
        if not view.native and (config.windows or config.maps):
            raise UserError("`windows` and `maps` are of native windows: give `crop=native`")
        samples = ranks.main_first(lambda: Samples(config.data, view, config))
        settings = settings_for("predictions", weights, view, samples.source, config) | {"flips": config.flips}
        if ranks.main:
            print(
                "\n".join([*weights.notes, *samples.notes, f"predictions of {len(samples)} samples go to {out}"]),
                flush=True,
            )
        chunks = Chunks(out, settings, samples.source, view)
        lock = ranks.on_main(lambda: chunks.begin(config.overwrite))
        model = weights.classifier(config.backend).to(ranks.device)
        chunks.make(logits_by(model, config.flips), ranks, "predicting")
        ranks.barrier()
        if ranks.main:
            bad = [*samples.left_out, *chunks.bad()]
            check_any(range(sum(len(chunk["sample"]) for chunk in chunks.of())), bad, samples.source)
            count = write_table(rows(chunks, samples, classes, config, weights.task), out)
            print(f"{out}: {count} rows")
            say_unreadable(bad, out)
            if config.maps:
                draw_maps(chunks, samples, classes, view, Path(config.maps))
            lock.close()
            chunks.remove()
    return out


def check_table(config: PredictConfig) -> Path:
    """The table to write. Raises UserError for options that can't be, and where it is there already."""
    out = Path(config.out)
    check_ending("out", out, TABLES)
    if out.exists() and not config.overwrite:
        raise UserError(f"`out` {out} exists: choose another or give `overwrite=True`")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    check_apart(config.data, out)
    if config.maps:
        check_installed("maps", "matplotlib", "matplotlib", "plots")
        if Path(config.maps).exists() and not Path(config.maps).is_dir():
            raise UserError(f"`maps` {config.maps} is a file: name a folder")
        if Path(config.maps).is_dir() and any(Path(config.maps).iterdir()) and not config.overwrite:
            raise UserError(f"`maps` {config.maps} is not empty: choose another or give `overwrite=True`")
    return out


def logits_by(model: Classifier, flips: str | None) -> Callable[[Tensor], dict[str, Tensor]]:
    """What makes the logits of normalised images [B, C, H, W]: the mean over the images and their flips."""

    def logits(images: Tensor) -> dict[str, Tensor]:
        outputs = [model(images.flip(axes) if axes else images).float() for axes in FLIPS[flips]]
        return {"logits": torch.stack(outputs).mean(0)}

    return logits


def answered(chunks: Chunks, samples: Samples, by_window: bool) -> Iterator[Answered]:
    """What was said of each image: of its windows the mean. by_window: of each window instead.

    An image with an unreadable window is left out, as in evaluation.
    """
    image, logits, boxes = -1, [], []
    for chunk in chunks.of("logits", *(["box"] if samples.windows else [])):
        for row, sample in enumerate(chunk["sample"].tolist()):
            value = torch.from_numpy(chunk["logits"][row])
            if by_window or not samples.windows:
                yield Answered(sample, value, chunk["box"][row : row + 1] if samples.windows else None, value[None])
                continue
            if (of := samples.windows.whole(sample)) != image:
                image, logits, boxes = of, [], []
            logits.append(value)
            boxes.append(chunk["box"][row])
            if len(logits) == samples.windows_of(image):
                together = torch.stack(logits)
                yield Answered(sample, together.mean(0), np.stack(boxes), together)


def rows(chunks: Chunks, samples: Samples, classes: tuple[str, ...], config: PredictConfig, task: str) -> Iterator[Row]:
    """The rows of the table. task: as in `answer`."""
    for found in answered(chunks, samples, config.windows):
        row: Row = {"file": samples.source.name(found.sample)}
        if config.windows:
            row |= dict(zip(("left", "top", "right", "bottom"), found.boxes[0].tolist(), strict=True))
        if samples.classes:
            row["label"] = samples.classes[int(samples.labels(np.array([found.sample]))[0])]
        yield row | answer(found.logits, classes, config.top_k, task)


def draw_maps(chunks: Chunks, samples: Samples, classes: tuple[str, ...], view: EvaluationView, folder: Path) -> None:
    """Draws of each image which class each of its windows was taken for, into a folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for number, found in enumerate(answered(chunks, samples, by_window=False)):
        with samples.images.open(samples.windows.whole(found.sample)) as file:
            image = open_image(file, view.reading)
            width, height = image.size
            scale = min(1.0, MAP_SIDE / max(image.size))
            pixels = image.resized_crop((0, 0, width, height), (round(scale * height), round(scale * width)))
        normalised = view.form.normalise(pixels[None])
        picture = rgb(shown(view.form, normalised, normalised))[0]
        name = samples.source.name(found.sample)
        path = folder / f"{number:06d}-{UNFIT.sub('-', Path(name).name)}.png"
        draw_class_map(picture, found.boxes * scale, found.of_windows.softmax(1).numpy(), classes, name, path)
    print(f"maps of classes: {folder}")
