"""Images as files in a folder."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NoReturn

from PIL import Image

from sparse_fcmae.data.decoders import EXTENSIONS
from sparse_fcmae.data.decoders.ome_zarr import EXTENSION as ZARR
from sparse_fcmae.data.sources.files import ImageFiles, printable
from sparse_fcmae.runtime.errors import UserError

NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow identifies but can't decode by itself


class ImageFolder(ImageFiles):
    """The image files under a folder, at any depth, in a fixed order.

    files: their paths below the folder, sorted. Hidden files and folders are left out. So is the folder `without`,
    which keeps a run that lies inside its own data from training on its own pictures. notes: which other files are left
    out, a line if there are any. Raises UserError where there is no such folder, where a folder can't be read, and
    where there is no image.
    """

    def __init__(self, root: str | os.PathLike, without: str | os.PathLike | None = None) -> None:
        check_folder(root)
        found = ((os.path.relpath(folder, root), names) for folder, names in walk(root, without))
        below = ((folder if folder != os.curdir else "", names) for folder, names in found)
        files, notes = images_among(os.path.join(folder, name) for folder, names in below for name in names)
        if not files:
            there = f" ({notes[0]})" if notes else ""
            raise UserError(f"{root}: no image files in this folder or below it{there}")
        super().__init__(str(root), root, sorted(files), notes)


def images_among(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """The paths of image files, told by their extensions, and a line about the other files that are not hidden."""
    extensions, files, others = image_extensions(), [], Counter[str]()
    for path in paths:
        name = os.path.basename(path)
        extension = os.path.splitext(name)[1].lower()
        if name.startswith("."):
            continue
        if extension in extensions:
            files.append(path)
        else:
            others[printable(extension) or "without an extension"] += 1
    kinds = ", ".join(f"{count} {extension}" for extension, count in sorted(others.items()))
    return files, [f"left out, as they are in no format that can be read: {kinds}"] if others else []


def check_folder(root: str | os.PathLike) -> None:
    """Raises UserError where there is no such folder."""
    if not os.path.isdir(root):
        what = "is a file, name the folder that holds the images" if os.path.isfile(root) else "no such folder"
        raise UserError(f"{root}: {what}")


def image_extensions() -> set[str]:
    """The extensions, such as ".jpg", of the formats that can be read."""
    Image.preinit()  # registers the common formats first, or every JPEG would be tried as a dozen others before
    Image.init()
    formats = set(Image.OPEN) - NOT_IMAGES
    known = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    return known.union(EXTENSIONS)


def walk(root: str | os.PathLike, without: str | os.PathLike | None) -> Iterator[tuple[str, list[str]]]:
    """Every folder under `root` and the names of its files, among which Zarr folders count.

    Links are followed, and no folder comes twice.
    """

    def unreadable(error: OSError) -> NoReturn:
        raise UserError(f"{root}: can't read {error.filename}: {error.strerror}")

    seen = {os.path.realpath(without)} if without else set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        names += [f for f in folders if f.lower().endswith(ZARR)]
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in names)
        yield folder, names
