"""Whether image files are still those of before, told by the contents of a few of them."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from io import SEEK_END
from typing import BinaryIO

import numpy as np

from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.addresses import is_address
from sparse_fcmae.data.sources.derived import Derived
from sparse_fcmae.data.sources.files import ImageFiles

LOOKED_AT = 16  # files, evenly spread
END_BYTES = 1 << 20  # of a file that are read at its beginning and at its end


def contents_of(source: ImageSource) -> dict[str, str]:
    """The SHA-256 of the beginning and the end of a few of the files that a source's images are in, by their names.

    Files that can't be read are left out, as are those behind addresses. Of a source that is no files there are none.
    """
    while isinstance(source, Derived):
        source = source.source
    if not isinstance(source, ImageFiles):
        return {}
    found = {}
    for index in np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist():
        if not is_address(source.files[index]):
            with suppress(OSError, AttributeError), source.open(index) as file:  # a Zarr folder has no bytes to read
                found[source.name(index)] = hashlib.sha256(_ends(file)).hexdigest()
    return found


def _ends(file: BinaryIO) -> bytes:
    """A small file, or the beginning, the end and the size of a large one."""
    beginning, size = file.read(END_BYTES), file.seek(0, SEEK_END)
    file.seek(max(END_BYTES, size - END_BYTES))
    return beginning + file.read(END_BYTES) + (str(size).encode() if size > 2 * END_BYTES else b"")


def other_contents(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line where files of the same names have other contents than before."""
    both = [name for name in before if name in now]
    others = [name for name in both if before[name] != now[name]]
    if not others:
        return []
    return [
        f"of {len(both)} images looked at, {len(others)} have other contents than when the run began, such as "
        f"{others[0]}: it goes on with what they are now"
    ]
