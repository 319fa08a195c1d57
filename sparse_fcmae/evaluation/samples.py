"""What a model sees of the images of any source: the images, their pages, or the windows that cover them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_fcmae.data.batches import Batch, EvaluationImages, make_loader
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders.image import library
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.class_folder import open_described
from sparse_fcmae.data.sources.labelled import Labelled, Some
from sparse_fcmae.data.sources.opening import is_named
from sparse_fcmae.data.sources.pages import by_page, labelled_by_page
from sparse_fcmae.data.sources.parts import labelled_parts
from sparse_fcmae.data.sources.windows import Covering
from sparse_fcmae.data.survey import spread
from sparse_fcmae.evaluation.config import EvaluateConfig
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic
from sparse_fcmae.runtime.run_folder import RunFolder

EXPORTED = "exported"  # how the folders in a run's folder begin that hold weights
UNFIT = re.compile(r"[^\w.-]+")  # for the name of a file
NAMED = 3  # unreadable images that a line names


class Samples:
    """All that a model sees of the images that `data` names, in a fixed order.

    source: of the samples. images: of the images. windows: that these are seen by, None where they are seen whole.
    classes: their names, None where the images' classes are not known. left_out: the images of which there is nothing
    to see. notes: what the user should know, a line each.
    """

    def __init__(self, data: Any, view: EvaluationView, config: SourceConfig) -> None:
        found = open_described(data, config)
        labelled = isinstance(found, Labelled)
        self.images: ImageSource = (labelled_by_page if labelled else by_page)(found, view.reading)
        self.source: ImageSource = self.images
        self.windows: Covering | None = None
        if view.native:
            self.windows = Covering(self.images.source if labelled else self.images, view.size, view.reading)
            self.source = labelled_parts(self.images, self.windows) if labelled else self.windows
        self.classes: tuple[str, ...] | None = self.source.classes if labelled else None
        self.left_out: list[BadImage] = list(getattr(self.source, "left_out", ()))
        self.notes = list(self.source.notes)
        if labelled:
            self.notes.append(f"{len(self.classes)} classes, such as {self.classes[0]}")

    def __len__(self) -> int:
        return len(self.source)

    def names(self, samples: np.ndarray) -> np.ndarray:
        """What the images of samples are called, as text."""
        return np.array([self.source.name(int(sample)) for sample in samples], dtype=str)

    def windows_of(self, image: int) -> int:
        """How many windows cover an image."""
        ends = self.windows.ends
        return int(ends[image] - (ends[image - 1] if image else 0))

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """int64, the classes of samples."""
        return self.source.labels[samples].numpy()


def spread_batches(samples: Samples, view: EvaluationView, count: int) -> Iterator[tuple[Batch, list[str]]]:
    """Batches of up to `count` samples, spread evenly, and the names of those in them that can be read."""
    chosen = Some(samples.source, spread(samples.source, count))
    keys = [part.tolist() for part in torch.arange(len(chosen)).split(view.batch_size)]
    loader = make_loader(EvaluationImages(chosen, view.of_image), keys, view.num_workers, pin_memory=False)
    with loader.explained():
        for batch in loader:
            names = [chosen.name(int(index)) for index in batch.index] if len(batch.pixels) else []
            yield batch, names


def check_ending(option: str, file: Path, endings: tuple[str, ...]) -> None:
    """Raises UserError for a file that ends as none that can be written, or that a library is missing for."""
    if file.suffix not in endings:
        raise UserError(f"`{option}` {file} must end in {', '.join(endings[:-1])} or {endings[-1]}")
    if file.suffix == ".parquet":
        try:
            library("pyarrow", "datasets")
        except OSError as error:
            raise UserError(f"`{option}` {file} {error}") from None


def check_apart(data: Any, out: Path, option: str = "out") -> None:
    """Raises UserError where a file to write lies in a folder of images, among which it would be found another time."""
    for name in [data] if isinstance(data, str | os.PathLike) else data:
        if is_named(name) and os.path.isdir(name) and out.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"`{option}` {out} lies among the images of {name}: choose another")


def warn_of_another_split(config: EvaluateConfig) -> None:
    """Says so where the run that the weights are of held out other images than these options do."""
    init = Path(config.init)
    run = init.parent if init.name.startswith(EXPORTED) else init
    saved = RunFolder(run, "fine-tuning").saved_options() or {}
    fraction, seed = saved.get("val_split"), saved.get("seed")
    same = config.val_split is not None or saved.get("data") == os.path.abspath(config.data)
    if same and fraction is not None and (fraction, seed) != (config.val_split, config.seed):
        print(
            f"{run} was trained with --val-split {fraction} --seed {seed}: without these it may be evaluated on images "
            "that it was trained on"
        )


def say_unreadable(bad: Sequence[BadImage], out: Path) -> None:
    """Names the images that are not in a file: the first here, and all in a file beside it."""
    beside = out.with_name(f"{out.name}.unreadable.txt")
    if not bad:
        beside.unlink(missing_ok=True)
        return
    write_atomic(beside, lambda path: path.write_text("".join(f"{name}: {reason}\n" for name, reason in bad)))
    shown = "; ".join(f"{name}: {reason}" for name, reason in bad[:NAMED])
    print(f"left out {len(bad)} that can't be read, which {beside} lists: {shown}")
