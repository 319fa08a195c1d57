"""What a model sees of the images of any source: the images, their pages, or the windows that cover them."""

from typing import Any

import numpy as np

from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.sources import BadImage, ImageSource
from sparse_fcmae.data.sources.class_folder import open_described
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.pages import by_page, labelled_by_page
from sparse_fcmae.data.sources.parts import labelled_parts
from sparse_fcmae.data.sources.windows import Covering
from sparse_fcmae.evaluation.run import EvaluationView


class Samples:
    """All that a model sees of the images that `data` names, in a fixed order.

    source: of the samples. images: of the images, which windows are parts of. classes: their names, None where the
    images' classes are not known. left_out: the images of which there is nothing to see.
    """

    def __init__(self, data: Any, view: EvaluationView, config: SourceConfig) -> None:
        found = open_described(data, config)
        labelled = isinstance(found, Labelled)
        self.images: ImageSource = (labelled_by_page if labelled else by_page)(found, view.reading)
        self.source: ImageSource = self.images
        if view.native:
            windows = Covering(self.images.source if labelled else self.images, view.size, view.reading)
            self.source = labelled_parts(self.images, windows) if labelled else windows
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

    def labels(self, samples: np.ndarray) -> np.ndarray:
        """int64, the classes of samples."""
        return self.source.labels[samples].numpy()
