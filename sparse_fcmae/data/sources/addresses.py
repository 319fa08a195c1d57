"""Files behind addresses such as s3://bucket/scan.tif: reached by fsspec, and kept on the disk up to a limit."""

import errno
import glob
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from sparse_fcmae.data.config import CACHE_GB
from sparse_fcmae.data.decoders.image import MissingLibrary, library
from sparse_fcmae.runtime.cache import cache_folder
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

T = TypeVar("T")
LIBRARIES = {  # by the kind of address, the library that reaches it
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
}
WAITS = 1.0, 2.0, 4.0, 8.0  # seconds before each further try
FILES_AT_ONCE, ASKED_AT_ONCE = 4, 32  # that are copied to the disk, and whose versions are asked for
SCANNED_EVERY = 0.01  # of the limit: so much is written by a process before the cache is looked through
NOT_FOUND, AGAIN = 404, (408, 429)  # the status of an answer, and those after which to try again
LASTING = ("GatedRepoError", "RepositoryNotFoundError")  # errors that stay
LEFT = 0.9  # of the limit that is kept where it was exceeded
VERSIONS = (  # what file systems call a file's version
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "Last-Modified",
    "updated",
    "xet_hash",
    "blob_id",
    "oid",
    "mtime",
)


def is_address(path: str) -> bool:
    """Whether a path is an address, such as s3://bucket/scan.tif."""
    return "://" in path


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. It is made anew in a forked process.

    Raises UserError for a kind of address that is not known, and where a library is missing.
    """
    kind = address.split("://")[0]
    if kind == "memory":
        raise UserError(f"{address}: these images were given in Python, so give `data` again")
    if kind not in LIBRARIES:
        raise UserError(f"{address}: addresses begin with s3://, gs://, hf:// or https://")
    try:
        library(LIBRARIES[kind], "remote")
        return library("fsspec.core", "remote").url_to_fs(address)
    except MissingLibrary as error:
        raise UserError(f"{address}: {error}") from None


def reach(address: str, ask: Callable[[Any, str], T]) -> T:
    """What `ask` gives of an address's file system and path, tried again as WAITS says.

    Raises FileNotFoundError or PermissionError at once, and OSError in one line where no try succeeds.
    """
    waits = iter(WAITS if address.startswith("http") else ())  # the other libraries try again themselves
    while True:
        try:
            return ask(*file_system(address))
        except (PermissionError, UserError):
            raise
        except Exception as caught:  # of each file system
            error, cause = caught, caught.__cause__  # web servers that can't be reached have no file, as fsspec has it
            if isinstance(error, FileNotFoundError):
                if not isinstance(cause, OSError) and getattr(cause, "status", NOT_FOUND) == NOT_FOUND:
                    raise FileNotFoundError(errno.ENOENT, "no such file or folder", address) from None
                error = cause
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise UserError(
                    f"{address}: no space left in {cache_folder('indexes')}: XDG_CACHE_HOME names another"
                ) from None
            wait = next(waits, None)
            refused = 400 <= getattr(error, "status", 0) < 500 and error.status not in AGAIN
            if type(error).__name__ == "NoCredentialsError":
                raise OSError("no credentials: set AWS_PROFILE, or for a public bucket FSSPEC_S3_ANON=true") from None
            if wait is None or refused or isinstance(error, ValueError) or type(error).__name__ in LASTING:
                raise OSError(f"can't be reached: {one_line(error)}") from None
        tqdm.write(f"{address}: {one_line(error)}: trying again in {wait:g} s", file=sys.stderr)
        time.sleep(wait)


class Listing(NamedTuple):
    """Files behind an address. root: the address that their paths begin at. files: of each path its size and version,
    -1 and "" where they are not known."""

    root: str
    files: dict[str, tuple[int, str]]


def listed(address: str) -> Listing:
    """The files below a folder's address, or those that match a pattern. UserError where they can't be listed."""

    def ask(system: Any, path: str) -> Listing:
        system.invalidate_cache()
        # or folders of a web server that can't be listed would be left out
        strictly = {"on_error": "raise"} if address.startswith("http") else {}
        found = system.glob(path, detail=True) if "*" in path else system.find(path, detail=True, **strictly)
        if not found:
            system.info(path)  # raises what is wrong, if anything is
        files = {name: info for name, info in found.items() if info["type"] == "file"}
        root = path.split("*")[0] if "*" in path else f"{path.rstrip('/')}/"
        if list(files) == [path]:  # one file
            root = path
        root = root.rpartition("/")[0]
        known = {name[len(root) + 1 :]: (info.get("size") or -1, _version(info)) for name, info in files.items()}
        return Listing(system.unstrip_protocol(root), known)

    try:
        root, files = reach(address, ask)
    except OSError as error:
        raise UserError(f"{address}: {_why(error)}") from None
    if address.startswith("http") and files:  # whose folders list names alone
        files = dict(zip(files, versions([f"{root}/{path}" for path in files]), strict=True))
    return Listing(root, files)


def matching(pattern: str) -> list[str]:
    """The files that a pattern of paths or addresses names, sorted, or the one that is named itself."""
    if is_address(pattern):
        root, files = listed(pattern) if "*" in pattern else (None, [])
        return sorted(f"{root}/{path}" for path in files) if root else [pattern]
    magic = glob.has_magic(pattern) and not os.path.exists(pattern)
    return sorted(glob.glob(pattern)) if magic else [pattern]


def versions(paths: Sequence[str]) -> list[tuple[int, str]]:
    """The size and the version of each file, on this machine or behind an address.

    Raises UserError for one that is not there.
    """

    def ask(path: str) -> tuple[int, str]:
        try:
            if not is_address(path):
                found = os.stat(path)
                return found.st_size, str(found.st_mtime_ns)
            info = reach(path, lambda system, inner: system.info(inner))
            return info.get("size") or -1, _version(info)
        except OSError as error:
            raise UserError(f"{path}: {_why(error)}") from None

    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        asked = pool.map(ask, paths)
        bar = {"unit": "file", "total": len(paths), "delay": 2, "leave": False, "dynamic_ncols": True}
        return list(tqdm(asked, desc="asking for versions", **bar))


def _why(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    return error.strerror or one_line(error)


def _version(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in VERSIONS if info.get(name)), "")


@contextmanager
def on_disk(path: str) -> Iterator[str]:
    """A file's path or, of a file behind an address, that of a copy, which is deleted afterwards."""
    if not is_address(path):
        yield path
        return
    try:
        folder = cache_folder("indexes")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"no folder for a copy of {path}: {one_line(error)}: XDG_CACHE_HOME names another") from None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".copy-") as place:
        copy = os.path.join(place, "file")
        reach(path, lambda system, inner: system.get_file(inner, copy))
        yield copy


def _pieces() -> Path:
    """The folder that pieces are kept in."""
    return cache_folder("pieces")


class Pieces:
    """Files behind addresses, and parts of them, which are kept on the disk once they were read.

    limit_gb: what is kept at most, in 10^9 bytes; what was used least recently is deleted beyond it. 0 keeps nothing.
    """

    def __init__(self, limit_gb: float = CACHE_GB) -> None:
        self.limit, self.complained = int(limit_gb * 1e9), False
        self.written = self.limit  # by this process since it looked through the cache: so the first piece has it look

    def read(self, address: str, version: str = "", start: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file from `start` on. size: how many, None for all. Raises OSError where they can't be had."""
        name = hashlib.sha256(f"{address}\0{version}\0{start}\0{size}".encode(errors="surrogateescape")).hexdigest()
        with suppress(OSError, RuntimeError):  # RuntimeError: of a user without a home
            kept = _pieces() / name[:2] / name
            data = kept.read_bytes()
            if data and size in (None, len(data)):
                with suppress(OSError):  # it is another user's
                    os.utime(kept)
                return data
        data = reach(address, lambda system, path: self._fetched(system, path, start, size))
        if self.limit:
            self._keep(name, data)
        return data

    def _fetched(self, system: Any, path: str, start: int, size: int | None) -> bytes:
        whole = {"cache_type": "none"} if system.protocol == "hf" else {}  # or it fetches megabytes ahead
        if size is None:
            return system.cat_file(path)
        data = system.cat_file(path, start=start, end=start + size, **whole)
        if len(data) > size:  # from a server that does not know parts of files
            data = data[start : start + size]
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes came of {size}: has the file changed?")
        return data

    def _keep(self, name: str, data: bytes) -> None:
        """Writes a piece to the cache. Where that is not possible, says so once and does without."""
        try:
            kept = _pieces() / name[:2] / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as place:  # which leaves nothing on a full disk
                piece = Path(place, name)
                piece.write_bytes(data)  # not synced: a piece that is not whole is fetched again
                os.replace(piece, kept)
        except (OSError, RuntimeError, UserError) as error:
            if not self.complained:
                print(f"images are fetched each time anew: {one_line(error)}", file=sys.stderr)
            self.complained = True
            return
        self.written += len(data)
        if self.written >= SCANNED_EVERY * self.limit:
            self.written = 0
            self._tidy()

    def _tidy(self) -> None:
        """Deletes the pieces that were used least recently, where all together exceed the limit."""
        found = []
        for path in _pieces().glob("*/*"):
            with suppress(OSError):  # another process may have deleted it
                info = path.stat()
                found.append((info.st_mtime, info.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit:
            return
        for _, size, path in sorted(found):
            if total <= LEFT * self.limit:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
