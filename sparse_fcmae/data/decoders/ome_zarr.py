"""Zarr folders: an image or a stack in chunks, of which those that a box needs are read. OME's images name their axes.

Specification of OME-Zarr, section "multiscales": https://ngff.openmicroscopy.org
"""

import logging
from pathlib import Path
from typing import Any

from sparse_fcmae.data.decoders.arrays import of_array
from sparse_fcmae.data.decoders.image import OpenImage, Reading, library

# the library leaves tasks behind where a chunk is damaged, which raises besides
logging.getLogger("asyncio").addFilter(lambda record: "Task was destroyed" not in record.getMessage())
EXTENSION = ".zarr"
USUAL_AXES = ("t", "c", "z", "y", "x")  # of OME-Zarr up to version 0.2, which names none


class ZarrFolder:
    """A folder in the place of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "ZarrFolder":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_image(folder: ZarrFolder, reading: Reading) -> OpenImage:
    """The image in a folder, of OME's images at its full resolution. Raises OSError where there is none."""
    zarr = library("zarr", "microscopy")
    try:
        node = zarr.open(str(folder.path), mode="r")
        found, letters = _array(node)
    except Exception as error:  # of each version of the format, and of each codec
        raise OSError(f"no Zarr array that can be read: {error}") from None
    if found is None:
        raise OSError("a group of Zarr arrays that is no image of OME: name the image's own folder below it")
    return of_array(found, reading, letters)


def _array(node: Any) -> tuple[Any, str | None]:
    """The array in a node and the letters of its axes; None where the node is no image, or has no names for them."""
    if hasattr(node, "shape"):
        return node, None
    attributes = dict(node.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        return None, None
    axes = scales[0].get("axes", USUAL_AXES)
    named = [axis if isinstance(axis, dict) else {"name": axis} for axis in axes]
    letters = ("C" if axis.get("type") == "channel" else axis["name"][0].upper() for axis in named)
    return node[scales[0]["datasets"][0]["path"]], "".join(letters)
