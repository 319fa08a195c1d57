"""Images that are those of another source, or parts of them."""

from abc import ABC, abstractmethod
from typing import Any

from sparse_fcmae.data.sources import ImageSource


class Derived(ABC):
    """A source each of whose images is one of `source`, which opens it and knows its name."""

    source: ImageSource

    @abstractmethod
    def whole(self, index: int) -> int:
        """The number in `source` of the image that one is, or is a part of."""

    def __str__(self) -> str:
        return str(self.source)

    def open(self, index: int) -> Any:
        """What `source` opens."""
        return self.source.open(self.whole(index))

    def name(self, index: int) -> str:
        """The image's name in `source`."""
        return self.source.name(self.whole(index))

    def version(self) -> str | None:
        """That of `source`."""
        return self.source.version()


class Annotated(Derived):
    """All images of `source`, with more about each of them."""

    def __len__(self) -> int:
        return len(self.source)

    def whole(self, index: int) -> int:
        """The same number, as the source has these images alone."""
        return index

    @property
    def images(self) -> int:
        """How many images there are, of which each may be there as several windows."""
        return getattr(self.source, "images", len(self))
