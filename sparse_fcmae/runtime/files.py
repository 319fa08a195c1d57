"""Files that appear whole or not at all, and folders that are refused before anything in them is lost."""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparse_fcmae.runtime.errors import UserError

# the names that `write_atomic` and `new_folder` give: a process number has at most seven digits, a date has eight
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d{1,7})\.(?:tmp|old)")


def leftover_of(name: str) -> str | None:
    """What was being written under this name by a process that was killed meanwhile; None where it is no such name."""
    match = LEFTOVER.fullmatch(name)
    return match["name"] if match else None


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a temporary file beside `path`, then moves it there once it is on the disk.

    Raises UserError where that is not possible (full disk, no permission); `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises UserError where a file can't be made at `path`; leaves what is there as it is."""
    if path.is_dir():
        raise UserError(f"can't write {path}: it is a folder")
    with writing(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> Any:
    """The JSON value in a file; UserError where it can't be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as JSON: {one_line(error)}") from None


def read_toml(path: Path) -> Any:
    """The table in a TOML file; UserError where it can't be read."""
    try:
        import tomllib
    except ImportError:
        raise UserError(f"{path}: TOML needs Python 3.11: write it as JSON") from None
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as TOML: {one_line(error)}") from None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file, readable by whom the umask allows (the library makes it the owner's alone)."""
    path.touch()  # as a file is made usually
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(mode)


def save_pickled(value: Any, path: Path) -> None:
    """Writes what `torch.save` makes of a value. On a full disk that is an OSError, not torch's own RuntimeError."""
    with path.open("wb") as file:
        noting = Noting(file)
        try:
            torch.save(value, noting)
        except RuntimeError:
            raise noting.error or OSError(f"torch.save failed to write {path.name}") from None


class Noting(io.RawIOBase):
    """Writes into a file, and keeps the OSError of a write that failed, of which PyTorch makes one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, moved to `path` when the block ends well and deleted when it does not.

    `path` may exist: it is replaced, and comes back if the move fails. If the process was killed during the move, it
    comes back when the folder is made anew.
    """
    path = Path(os.path.realpath(path))  # what a link names is replaced, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for lost in [p for p in path.parent.iterdir() if leftover_of(p.name) == path.name and p.is_dir()]:
                if lost.suffix == ".old" and not path.exists():
                    os.replace(lost, path)
                elif lost.suffix == ".old" or not _runs(int(LEFTOVER.fullmatch(lost.name)["process"])):
                    shutil.rmtree(lost)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        yield temporary
        with writing(path):
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a failed write raises into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't write {path}: {getattr(error, 'strerror', None) or one_line(error)}") from None


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


def sync(path: Path) -> None:
    """Has the file or folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
