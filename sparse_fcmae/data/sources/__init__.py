"""Where images come from. Each kind of source is one file in this folder.

Only a source knows files, folders or archives. The rest of the package counts its images, opens one as a binary file,
and asks for the name of an image that a message is about.
"""

from collections.abc import Sequence
from typing import BinaryIO, NamedTuple, Protocol

from torch import Tensor


class BadImage(NamedTuple):
    """An image that could not be read: its name in the source, and the decoder's reason."""

    name: str
    reason: str


class ImageSource(Protocol):
    """Encoded images, such as JPEGs, that are counted from 0.

    fingerprint: a text that changes when images are added, removed or renamed. A run is resumed only on the images it
    was started with. notes: what the user should know of the source, such as what it leaves out, a line each.

    Several processes open images at the same time. They are forked from one that has opened some itself, or get a
    pickled copy of the source. Forked processes would move each other's place in a file that all read from. So an
    archive or connection is kept beside the `os.getpid()` that opened it, opened again where that is another, and left
    out of the pickled copy.
    """

    fingerprint: str
    notes: Sequence[str]

    def __len__(self) -> int: ...

    def __str__(self) -> str:
        """Where the images are, for messages and reports."""
        ...

    def open(self, index: int) -> BinaryIO:
        """An image's bytes as a seekable binary file, or what `open_image` takes in its place; the caller closes it."""
        ...

    def name(self, index: int) -> str:
        """What messages and logs call an image. It can always be printed."""
        ...

    def version(self) -> str | None:
        """A text that changes when an image's bytes do, as files' times of change tell; None where nothing tells it."""
        ...


class LabelledSource(ImageSource, Protocol):
    """Images that each belong to a class.

    classes: the names of the classes. labels: int64 [N], for each image an index into `classes`.
    """

    classes: tuple[str, ...]
    labels: Tensor

    def take(self, indices: Sequence[int]) -> "LabelledSource":
        """A source of these images alone, with the same classes."""
        ...
