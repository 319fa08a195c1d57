"""Indexes of large sources, kept in the user's cache so that they are made once."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic

Index = dict[str, np.ndarray]
VERSION = 2  # of what indexes hold


def cache_folder() -> Path:
    """Where indexes are kept: $XDG_CACHE_HOME/sparse-fcmae/indexes, or ~/.cache in its place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-fcmae" / "indexes"


def remembered(
    kind: str, files: Sequence[str], versions: Iterable[tuple[int, str]], make: Callable[[], Index]
) -> tuple[Index, list[str]]:
    """The index of files: what an earlier call has kept, or what `make` gives, which is kept.

    kind: what makes it. An index is stale, and made again, where a file's path, size or version is another. Returns
    with it a line where it could not be kept, for want of space, say.
    """
    digest = hashlib.sha256(f"{VERSION} {kind}".encode())
    for file, (size, version) in zip(files, versions, strict=True):
        place = file if "://" in file else os.path.abspath(file)
        digest.update(f"\0{place}\0{size}\0{version}".encode(errors="surrogateescape"))
    with suppress(Exception):  # there is none, or it is damaged
        path = cache_folder() / f"{digest.hexdigest()}.npz"
        with np.load(path, allow_pickle=False) as kept:
            return dict(kept), []
    index = make()
    try:
        path = cache_folder() / f"{digest.hexdigest()}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda p: _save(p, index))
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: of a user without a home
        return index, [f"the index is made again next time, as it can't be kept: {error}"]
    return index, []


def _save(path: Path, index: Index) -> None:
    with path.open("wb") as file:
        np.savez(file, **index)
