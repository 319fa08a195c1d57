"""Whether image files are still those of before, told by the contents of a few of them."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.addresses import is_address
from sparse_fcmae.data.sources.derived import Derived
from sparse_fcmae.data.sources.files import ImageFiles

LOOKED_AT = 16  # files, evenly spread


def contents_of(source: ImageSource) -> dict[str, str]:
    """The SHA-256 of a few of the files that a source's images are in, by their names.

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
                found[source.name(index)] = hashlib.sha256(file.read()).hexdigest()
    return found


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
