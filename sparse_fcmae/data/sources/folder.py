"""Images as files in a folder."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from PIL import Image

from sparse_fcmae.runtime.errors import UserError

NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow identifies but can't decode by itself


class ImageFolder:
    """The image files under a folder, at any depth, in a fixed order.

    files: their paths below the folder, sorted. Hidden files and folders are left out. So is the folder `without`,
    which keeps a run that lies inside its own data from training on its own pictures. Raises UserError where there is
    no such folder, where a folder can't be read, and where there is no image.
    """

    def __init__(self, root: str | os.PathLike, without: str | os.PathLike | None = None) -> None:
        self.root = Path(root)
        check_folder(root)
        extensions = image_extensions()
        self.files = sorted(
            os.path.relpath(os.path.join(folder, name), root)
            for folder, names in walk(root, without)
            for name in names
            if os.path.splitext(name)[1].lower() in extensions and not name.startswith(".")
        )
        if not self.files:
            raise UserError(f"{root}: no image files in this folder or below it")
        self.fingerprint = fingerprint_of(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        return str(self.root)

    def open(self, index: int) -> BinaryIO:
        """The file with an image's bytes."""
        return (self.root / self.files[index]).open("rb")

    def name(self, index: int) -> str:
        """An image's path below the folder. Bytes that are no UTF-8 appear as escapes."""
        return self.files[index].encode(errors="backslashreplace").decode()


def check_folder(root: str | os.PathLike) -> None:
    """Raises UserError where there is no such folder."""
    if not os.path.isdir(root):
        what = "is a file, name the folder that holds the images" if os.path.isfile(root) else "no such folder"
        raise UserError(f"{root}: {what}")


def fingerprint_of(files: Sequence[str]) -> str:
    """A digest of the files' names."""
    return hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()


def image_extensions() -> set[str]:
    """The extensions, such as ".jpg", of the formats that Pillow can decode."""
    Image.preinit()  # registers the common formats first, or every JPEG would be tried as a dozen others before
    Image.init()
    formats = set(Image.OPEN) - NOT_IMAGES
    return {extension for extension, name in Image.registered_extensions().items() if name in formats}


def walk(root: str | os.PathLike, without: str | os.PathLike | None) -> Iterator[tuple[str, list[str]]]:
    """Every folder under `root` and the names of its files. Links are followed, and no folder comes twice."""

    def unreadable(error: OSError) -> NoReturn:
        raise UserError(f"{root}: can't read {error.filename}: {error.strerror}")

    seen = {os.path.realpath(without)} if without else set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield folder, names
