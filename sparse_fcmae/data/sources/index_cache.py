"""Indexes of large sources, kept in the user's cache so that they are made once."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from sparse_fcmae.runtime.cache import cache_folder
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic

Index = dict[str, np.ndarray]
VERSION = 3  # of what indexes hold


def remembered(
    kind: str,
    key: str,
    make: Callable[[], Index],
    holds: Callable[[Index], bool] = lambda index: True,
    worth: Callable[[Index], bool] = lambda index: True,
) -> tuple[Index, list[str]]:
    """An index: what an earlier call has kept, or what `make` gives, which is kept.

    kind: what makes it. key: a text that says of what, and changes where the index would. holds: whether a kept index
    still does. worth: whether one is to be kept. Returns with it a line where it could not be kept, for want of space,
    say.
    """
    digest = hashlib.sha256(f"{VERSION} {kind} {key}".encode(errors="surrogateescape")).hexdigest()
    with suppress(Exception):  # there is none, or it is damaged
        with np.load(cache_folder("indexes") / f"{digest}.npz", allow_pickle=False) as kept:
            index = dict(kept)
        if holds(index):
            return index, []
    index = make()
    if not worth(index):
        return index, []
    try:
        path = cache_folder("indexes") / f"{digest}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda p: _save(p, index))
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: of a user without a home
        return index, [f"the index is made again next time, as it can't be kept: {error}"]
    return index, []


def _save(path: Path, index: Index) -> None:
    with path.open("wb") as file:
        np.savez(file, **index)
