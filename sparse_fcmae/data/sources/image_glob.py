"""Images whose paths match a pattern such as `scans/**/*_w1.tif`."""

import glob
import os
from pathlib import Path

from sparse_fcmae.data.decoders.ome_zarr import EXTENSION as ZARR
from sparse_fcmae.data.sources.files import ImageFiles
from sparse_fcmae.data.sources.folder import images_among
from sparse_fcmae.runtime.errors import UserError


class ImageGlob(ImageFiles):
    """The image files whose paths match a pattern, sorted.

    In the pattern `*` stands for any text, `?` for any character, `[ab]` for one of these, and `**` for folders at any
    depth. Hidden files do not match, and files below the folder `without` are left out. files: the paths below the
    folder in front of the first such sign. notes: which other files match. Raises UserError where no image matches.
    """

    def __init__(self, pattern: str, without: str | os.PathLike | None = None) -> None:
        found = (path for path in glob.iglob(pattern, recursive=True) if is_file(path))
        if without:
            hidden = Path(without).resolve()
            found = (path for path in found if not Path(path).resolve().is_relative_to(hidden))
        root = above_magic(pattern)
        files, notes = images_among(os.path.relpath(path, root) for path in found)
        if not files:
            there = f" ({notes[0]})" if notes else ""
            raise UserError(f"{pattern}: no image file matches this pattern{there}")
        super().__init__(pattern, root, sorted(set(files)), notes)


def is_file(path: str) -> bool:
    """Whether a path is that of a file, or of a Zarr folder, whose own files are none."""
    folder, name = os.path.split(path.rstrip(os.sep))
    if ZARR + os.sep in folder.lower() + os.sep:
        return False
    return os.path.isfile(path) or (name.lower().endswith(ZARR) and os.path.isdir(path))


def above_magic(pattern: str) -> str:
    """The folder that all matches of a pattern are in, as far as the pattern says it."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder or os.curdir
