"""Images in tar archives, by the convention of webdataset: many images a file, and what belongs to one beside it."""

import hashlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from sparse_fcmae.data.sources.addresses import FILES_AT_ONCE, Pieces, is_address, matching, on_disk, versions
from sparse_fcmae.data.sources.files import Paths, printable
from sparse_fcmae.data.sources.folder import image_extensions
from sparse_fcmae.data.sources.index_cache import Index, remembered
from sparse_fcmae.data.sources.labelled import Rows, splits_in
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

CLASS, LONGEST_CLASS = ".cls", 1000  # the extension of files that name a class, and their bytes at most
PADDING = 1 << 20  # bytes that are looked at behind the last file
BRACES = re.compile(r"\{([^{}]*)\}")  # {000..003} counts, {a,b} lists
COUNTED = re.compile(r"(\d+)\.\.(\d+)$")


class Contents(NamedTuple):
    """What is in an archive.

    images: of each its path, where it starts, and its size in bytes. class_of: the names of classes, by the path up to
    the first dot. others: other files, by their extension.
    """

    images: list[tuple[str, int, int]]
    class_of: dict[str, str]
    others: Counter[str]


class TarShards:
    """The image files in tar archives, in the order of the archives and of what they hold.

    place: the archives, for messages. shards: their paths or addresses. pieces: what reads behind addresses. classes:
    the names of the classes, which .cls files beside the images hold. labels: for each image an index into these, -1
    without one. Where each image lies is found out once, with a progress bar, and kept in the user's cache. Whatever
    else the archives hold, such as captions, is passed over and counted in `notes`. Raises UserError for an archive
    that is missing, damaged, compressed or without images.
    """

    def __init__(self, place: str, shards: Sequence[str], pieces: Pieces) -> None:
        self.place, self.shards, self.pieces = place, list(shards), pieces
        self.versions = versions(self.shards)
        places = (shard if is_address(shard) else os.path.abspath(shard) for shard in self.shards)
        key = self.version_text = "\0".join(
            f"{place}\0{size}\0{version}" for place, (size, version) in zip(places, self.versions, strict=True)
        )
        index, self.notes = remembered("tar", f"{sorted(image_extensions())}\0{key}", self._index)
        self.shard, self.start, self.size = index["shard"], index["start"], index["size"]
        self.classes, self.labels = index["classes"], index["labels"]
        self.names = Paths.of_arrays(index["names"], index["ends"])
        parts = (os.path.basename(shard).encode(errors="surrogateescape") + b"\n" for shard in self.shards)
        self.fingerprint = hashlib.sha256(b"".join(parts) + index["names"].tobytes() + self.size.tobytes()).hexdigest()
        if len(index["others"]):
            kinds = ", ".join(f"{count} {kind}" for kind, count in zip(index["kinds"], index["others"], strict=True))
            self.notes.append(f"passed over in the archives, as they are no images: {kinds}")

    def __len__(self) -> int:
        return len(self.start)

    def __str__(self) -> str:
        return self.place

    def open(self, index: int) -> BinaryIO:
        """An image's bytes."""
        number, start, size = (int(array[index]) for array in (self.shard, self.start, self.size))
        if is_address(self.shards[number]):
            return io.BytesIO(self.pieces.read(self.shards[number], self.versions[number][1], start, size))
        with open(self.shards[number], "rb") as file:
            file.seek(start)
            return io.BytesIO(file.read(size))

    def name(self, index: int) -> str:
        """The archive and the image's path in it."""
        return printable(f"{os.path.basename(self.shards[self.shard[index]])}/{self.names[index]}")

    def sample(self, index: int) -> tuple[int, str, list[str]]:
        """The number of an image's archive, its path up to the first dot of its name, and the words behind that.

        Files of one sample have the first two in common. Of 7.mask.png the path is "7", and the words are mask and png.
        """
        name = str(self.names[index])
        return int(self.shard[index]), _key(name), os.path.basename(name).lower().split(".")[1:]

    def version(self) -> str | None:
        """Where the archives are, their sizes and versions; None where a server does not tell these."""
        known = all(version for _, version in self.versions)
        return self.version_text if known else None

    def rows(self) -> Rows:
        """The images with their classes, and with the splits that the archives' names begin with, as train-000.tar."""
        labels = None
        if len(self.classes):
            labels = ["" if label < 0 else str(self.classes[label]) for label in self.labels.tolist()]
        of_shard = splits_in(self.shards)
        splits = of_shard and [of_shard[shard] for shard in self.shard.tolist()]
        return Rows(self, labels, splits, f"no {CLASS} file beside an image names its class")

    def _index(self) -> Index:
        """Where the images lie in the archives."""
        others, names, classes = Counter[str](), [], []
        places: list[tuple[int, int, int]] = []
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            contents = (pool.map if any(map(is_address, self.shards)) else map)(_contents, self.shards)
            for number, content in enumerate(
                tqdm(contents, desc="indexing", unit="archive", total=len(self.shards), dynamic_ncols=True)
            ):
                others.update(content.others)
                places += [(number, start, size) for _, start, size in content.images]
                names += [name for name, _, _ in content.images]
                classes += [content.class_of.get(_key(name)) for name, _, _ in content.images]
        shard, start, size = np.array(places, np.int64).T
        paths, kinds = Paths(names), sorted(others)
        known = sorted({name for name in classes if name is not None})
        label_of = {name: label for label, name in enumerate(known)} | {None: -1}
        return {
            "shard": shard.astype(np.int32),
            "start": start,
            "size": size,
            "names": paths.text,
            "ends": paths.ends,
            "classes": np.array(known, np.str_),
            "labels": np.array([label_of[name] for name in classes], np.int32),
            "kinds": np.array(kinds, np.str_),
            "others": np.array([others[kind] for kind in kinds], np.int64),
        }


def _key(name: str) -> str:
    """What the files of a sample have in common: the path up to the first dot in the file's name."""
    folder, file = os.path.split(name)
    return os.path.join(folder, file.split(".", 1)[0])


def _contents(shard: str) -> Contents:
    """What is in an archive. Raises UserError where it can't be read, and where it holds no image."""
    try:
        with on_disk(shard) as path:
            members, extensions = _members(shard, path), image_extensions()
            content = Contents([], {}, Counter())
            for member in members:
                extension = os.path.splitext(member.name)[1].lower()
                if extension in extensions:
                    content.images.append((member.name, member.offset_data, member.size))
                elif extension == CLASS:
                    content.class_of[_key(member.name)] = _text(shard, path, member)
                else:
                    content.others[extension or "without an extension"] += 1
    except OSError as error:
        raise UserError(f"{shard}: {error.strerror or one_line(error)}") from None
    if not content.images:
        raise UserError(f"{shard}: no image in this archive")
    return content


def _text(shard: str, path: str, member: tarfile.TarInfo) -> str:
    """The text in a small file of an archive. Raises UserError for another one."""
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        content = file.read(min(member.size, LONGEST_CLASS))
    with suppress(UnicodeDecodeError):
        if (text := content.decode().strip()).isprintable() and member.size <= LONGEST_CLASS:
            return text
    raise UserError(f"{shard}: {member.name} names no class, which is a word or number in UTF-8")


def _members(shard: str, path: str) -> list[tarfile.TarInfo]:
    """The files in an archive, hidden ones left out. Raises UserError where it can't be read to its end.

    shard: what it is called. path: where it is on the disk.
    """
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
    except tarfile.TarError as error:
        with open(path, "rb") as file:
            packed = file.read(4)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
        what = "compressed, so unpack it first, say by gunzip" if packed else f"damaged or no tar archive: {error}"
        raise UserError(f"{shard}: {what}") from None
    _check_end(shard, path, members)
    if sparse := next((member.name for member in members if member.issparse()), None):
        raise UserError(f"{shard}: {sparse} is stored with holes: pack the archive without --sparse")
    if links := [member.name for member in members if member.islnk() or member.issym()]:
        raise UserError(f"{shard}: {links[0]} is a link: pack the archive with --dereference --hard-dereference")
    files = [member for member in members if member.isfile() and not os.path.basename(member.name).startswith(".")]
    if files and files[-1].offset_data + files[-1].size > size:
        raise UserError(f"{shard}: damaged: it ends within {files[-1].name}")
    return files


def _check_end(shard: str, path: str, members: list[tarfile.TarInfo]) -> None:
    """Raises UserError where the members are not followed by the empty blocks that end an archive, and by no more."""
    end = 0
    if members:
        end = members[-1].offset_data + -(-members[-1].size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with open(path, "rb") as file:
        file.seek(end)
        rest = file.read(PADDING)
    if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
        raise UserError(f"{shard}: damaged, or several archives in a row: it goes on behind its last readable file")


def names_shards(data: str) -> bool:
    """Whether `data` is the path of an archive, or a pattern of such paths."""
    return data.lower().endswith(".tar")


def open_shards(data: str, pieces: Pieces) -> TarShards:
    """The archives that a path or a pattern such as `shards/{000..003}.tar` names. Raises UserError for none."""
    found: list[str] = []
    for path in expanded(data):
        named = matching(path)
        if not named:
            raise UserError(f"{path}: no archive matches this pattern")
        found += named
    for path in found:
        if not is_address(path) and not os.path.isfile(path):
            raise UserError(f"{path}: no such archive")
    return TarShards(data, found, pieces)


def expanded(pattern: str) -> list[str]:
    """The paths that a pattern with braces stands for, in its order: {08..11} for 08 to 11, {a,b} for a and b."""
    pieces = BRACES.split(pattern)
    choices: list[list[str]] = []
    for number, piece in enumerate(pieces):
        counted = COUNTED.match(piece) if number % 2 else None
        if counted:
            first, last = counted.groups()
            choices.append([str(value).zfill(len(first)) for value in range(int(first), int(last) + 1)])
        else:
            choices.append(piece.split(",") if number % 2 else [piece])
    return ["".join(parts) for parts in product(*choices)]
