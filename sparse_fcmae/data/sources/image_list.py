"""Images whose paths stand in a text file."""

import os
from pathlib import Path

from sparse_fcmae.data.sources.addresses import Pieces
from sparse_fcmae.data.sources.files import USUAL_PIECES, ImageFiles, leads_somewhere
from sparse_fcmae.runtime.errors import UserError


class ImageList(ImageFiles):
    """The images that a text file names, a path a line, in the order of the lines.

    Relative paths start from the folder of the text file. Lines are UTF-8, and empty ones are passed over. A path that
    leads nowhere counts as an unreadable image. Raises UserError where the text file can't be read or names no image.
    """

    def __init__(self, path: str | os.PathLike, pieces: Pieces = USUAL_PIECES) -> None:
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from None
        files = [line.strip() for line in lines if line.strip()]
        if not files:
            raise UserError(f"{path}: names no images: write the path of one on each line")
        if not leads_somewhere(path.parent, files):
            raise UserError(f"{path}: no line of it names a file: relative paths start from {path.parent}")
        super().__init__(str(path), path.parent, files, pieces=pieces)
