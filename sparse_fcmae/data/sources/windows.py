"""The images of a source as windows: random ones, of which a large image has more, or all that cover an image."""

import math
import os
from abc import abstractmethod
from contextlib import ExitStack
from typing import Any, NamedTuple

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Box, OpenImage, Reading
from sparse_fcmae.data.decoders.window import Window, covering
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.parts import Parts
from sparse_fcmae.data.views import NativeView, check_window


class Opened(NamedTuple):
    """An image that a process keeps open. key: the process, and the image's number. boxes: of the windows on it."""

    key: tuple[int, int]
    image: OpenImage
    boxes: list[Box]
    files: ExitStack


class Boxes(Parts):
    """Boxes of the images of a source, each an image of its own. A subclass says which, by `boxes`.

    A process keeps the image open that it has opened last, so that neighbouring boxes decode it once. what: the boxes,
    for their count to be kept by. Images that can't be opened, or have no box, are left out.
    """

    def __init__(self, source: ImageSource, reading: Reading, what: str) -> None:
        self.reading = reading
        self._opened: Opened | None = None
        super().__init__(source, reading, what, lambda image: len(self.boxes(*image.size)), max_bad_images=None)

    @abstractmethod
    def boxes(self, width: int, height: int) -> list[Box]:
        """Those of an image. Raises OSError for one that has none."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def open(self, index: int) -> Window:
        """A window of an image."""
        whole = self.whole(index)
        opened = self._opened_image(whole)
        if len(opened.boxes) != self.ends[whole] - (self.ends[whole - 1] if whole else 0):
            raise OSError("has another size than when its windows were counted: has the file changed?")
        return Window(opened.image, opened.boxes[self.number(index)])

    def _opened_image(self, whole: int) -> Opened:
        """An image, which stays open until another one is asked for."""
        key = os.getpid(), whole
        if self._opened is None or self._opened.key != key:
            if self._opened:
                self._opened.files.close()
                self._opened = None
            with ExitStack() as files:
                image = open_image(files.enter_context(self.source.open(whole)), self.reading)
                self._opened = Opened(key, image, self.boxes(*image.size), files.pop_all())
        return self._opened


class Covering(Boxes):
    """The windows of (height, width) pixels that cover the images of a source, each an image of its own.

    Images that are smaller than a window are left out.
    """

    def __init__(self, source: ImageSource, window: tuple[int, int], reading: Reading) -> None:
        self.window, (height, width) = window, window
        super().__init__(source, reading, f"covering {height}x{width}")
        self.describe(f"windows of {height}x{width} pixels cover {self.readable} images")

    def boxes(self, width: int, height: int) -> list[Box]:
        check_window(width, height, *self.window)
        return covering(width, height, self.window)


class Windows(Parts):
    """Every image of a source, as often as windows of a view's size fit into its area, but once at least.

    Which part of its image a window shows is up to the view. Images that can't be opened, or are smaller than the
    view's least window, are left out and named. Raises UserError where they are more than the fraction
    `max_bad_images`.
    """

    def __init__(self, source: ImageSource, view: NativeView, max_bad_images: float) -> None:
        height, width = view.size

        def fitting(image: OpenImage) -> int:
            view.check(*image.size)
            return max(1, math.prod(image.size) // (height * width))

        what = f"fitting {height}x{width} from {view.scale[0]}{' turned' if view.rotate else ''}"
        super().__init__(source, view.reading, what, fitting, max_bad_images)
        self.describe(f"windows of {height}x{width} pixels in {self.readable} images")

    @property
    def images(self) -> int:
        """How many images the windows are of, which are those that may turn out to be unreadable."""
        return self.readable
