"""Images as files in a folder."""

import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from sparse_fcmae.data.decoders import EXTENSIONS
from sparse_fcmae.data.decoders.ome_zarr import EXTENSION as ZARR
from sparse_fcmae.data.sources.files import ImageFiles, Paths, fingerprint_of, printable
from sparse_fcmae.data.sources.index_cache import Index, remembered
from sparse_fcmae.runtime.errors import UserError

KEPT_FROM = 50_000  # images from which on an index is kept
NAMED = 5  # runs that a line names
SETTLED = 2 * 10**9  # nanoseconds: a folder that changed within these might have changed unseen
INTO_IMAGES = "gdal_translate --config GDAL_TIFF_INTERNAL_MASK YES"
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow identifies but can't decode by itself


class ImageFolder(ImageFiles):
    """The image files under a folder, at any depth, in a fixed order.

    files: their paths below the folder, sorted. Hidden files and folders are left out. So are the folder `without` and
    all folders of runs, which keeps a run from training on pictures that runs have drawn. notes: which other files and
    which runs are left out, a line each if there are any. What was found in a folder of KEPT_FROM images or more is
    kept in the user's cache until a file is added to one of its folders, removed or renamed. Raises UserError where
    there is no such folder, where a folder can't be read, and where there is no image.
    """

    def __init__(self, root: str | os.PathLike, without: str | os.PathLike | None = None) -> None:
        check_folder(root)
        began = time.time_ns()
        key = "\0".join(
            [os.path.abspath(root), os.path.abspath(without) if without else "", *sorted(image_extensions())]
        )
        index, notes = remembered(
            "folder",
            key,
            make=lambda: _index(root, without),
            holds=lambda index: _unchanged(root, index),
            worth=lambda index: len(index["ends"]) > KEPT_FROM and index["times"].max() < began - SETTLED,
        )
        notes = [*index["notes"].tolist(), *notes]
        files = Paths.of_arrays(index["names"], index["ends"])
        if not files:
            there = f" ({notes[0]})" if notes else ""
            raise UserError(f"{root}: no image files in this folder or below it{there}")
        super().__init__(str(root), root, files, notes, fingerprint=str(index["fingerprint"]))


def _index(root: str | os.PathLike, without: str | os.PathLike | None) -> Index:
    """What is in a folder: names and ends of the images' paths, and its folders with the times of their last change."""
    visited: list[tuple[str, int]] = []
    runs: list[str] = []
    files, notes = images_among(paths_below(root, without, visited, runs))
    notes += note_of_runs(runs)
    folders = Paths(folder for folder, _ in visited)
    return {
        "names": files.text,
        "ends": files.ends,
        "fingerprint": np.array(fingerprint_of(files)),
        "notes": np.array(notes, np.str_),
        "folders": folders.text,
        "folder_ends": folders.ends,
        "times": np.array([changed for _, changed in visited], np.int64),
    }


def note_of_runs(runs: Sequence[str]) -> list[str]:
    """A line about the folders of runs that are left out, where there are any."""
    if not runs:
        return []
    shown = ", ".join(printable(run.rstrip(os.sep)) for run in runs[:NAMED])
    return [f"left out, as they are runs: {shown}{', ...' if len(runs) > NAMED else ''}"]


def _unchanged(root: str | os.PathLike, index: Index) -> bool:
    """Whether all folders have the times of their last change that are in an index."""
    folders = Paths.of_arrays(index["folders"], index["folder_ends"])
    times = (os.stat(os.path.join(root, folder)).st_mtime_ns for folder in folders)
    return all(now == then for now, then in zip(times, index["times"].tolist(), strict=True))


def images_among(paths: Iterable[str]) -> tuple[Paths, list[str]]:
    """The paths of image files, told by their extensions, and a line about the other files that are not hidden."""
    extensions, others = image_extensions(), Counter[str]()

    def images() -> Iterator[str]:
        for path in tqdm(paths, desc="looking for images", unit="file", delay=2, leave=False, dynamic_ncols=True):
            name = os.path.basename(path)
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if extension in extensions:
                yield path
            else:
                others[printable(extension) or "without an extension"] += 1

    files = Paths(images())
    kinds = ", ".join(f"{count} {extension}" for extension, count in sorted(others.items()))
    archives = ": name archives by a pattern, as 'shards/*.tar'" if others[".tar"] else ""
    masks = f"; masks beside images are not heeded: {INTO_IMAGES} writes them into these" if others[".msk"] else ""
    return files, [f"left out, as they are in no format that can be read: {kinds}{archives}{masks}"] if others else []


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


def paths_below(
    root: str | os.PathLike,
    without: str | os.PathLike | None = None,
    visited: list[tuple[str, int]] | None = None,
    runs: list[str] | None = None,
) -> Iterator[str]:
    """The paths of the files below a folder, sorted. Zarr folders count as files. Hidden folders are left out.

    Links are followed, and no folder comes twice. visited: gets each folder's path below `root`, and the time of its
    last change in nanoseconds. runs: gets the paths of folders below it that are those of runs, which are left out
    then. Raises UserError for a folder that can't be read.
    """
    seen = {os.path.realpath(without)} if without else set()

    def below(folder: str) -> Iterator[str]:
        path = os.path.join(root, folder)
        real = os.path.realpath(path)
        if real in seen:
            return
        seen.add(real)
        try:
            if visited is not None:
                visited.append((folder, os.stat(path).st_mtime_ns))
            with os.scandir(path) as found:
                entries = sorted(_key(entry) for entry in found)
        except OSError as error:
            raise UserError(f"{root}: can't read {error.filename}: {error.strerror}") from None
        if runs is not None and folder and is_run(path, entries):
            runs.append(folder)
            return
        for entry in entries:
            if not entry.endswith(os.sep):
                yield folder + entry
            elif not entry.startswith("."):
                yield from below(folder + entry)

    return below("")


def is_run(folder: str, entries: Collection[str]) -> bool:
    """Whether a folder with these entries, of which folders end with /, is that of a run of this package."""
    if "config.json" not in entries or f"checkpoints{os.sep}" not in entries:
        return False
    try:
        with open(os.path.join(folder, "config.json"), "rb") as file:
            return b'"format": "sparse-fcmae ' in file.read(200)
    except OSError:
        return False


def _key(entry: os.DirEntry) -> str:
    """A name by which the entries of a folder are in the order of the paths below it: that of a folder ends with /."""
    is_folder = entry.is_dir() and not entry.name.lower().endswith(ZARR)
    return entry.name + os.sep if is_folder else entry.name
