"""TIFF files: by Pillow those that are photographs of one page, all others by tifffile, with their values kept."""

import logging
import math
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sparse_fcmae.data.decoders import photograph
from sparse_fcmae.data.decoders.arrays import KNOWN
from sparse_fcmae.data.decoders.image import ArrayImage, OpenImage, Reading, library
from sparse_fcmae.data.format import DTYPES

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, PLANAR, NODATA = 258, 262, 284, 42113  # tags
CHANNELS = "SC"  # tifffile's letters for samples and channels; all but X and Y that is left counts pages


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is a TIFF or a BigTIFF."""
    return head.startswith(MAGIC)


def open_image(file: BinaryIO, reading: Reading) -> OpenImage:
    """The image in a file. Raises OSError where it holds something else, and MissingLibrary without tifffile."""
    image = _opened_by_pillow(file)
    if image is not None:
        return photograph.from_pillow(image, reading)
    file.seek(0)
    tifffile = library("tifffile", "microscopy")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is raised or does not matter
    try:
        with tifffile.TiffFile(file) as tiff:
            return _image_of(tiff, reading)
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError) as error:
        if "imagecodecs" in str(error):
            library("imagecodecs", "microscopy")
        raise OSError(f"a TIFF that can't be read: {error}") from None


def _opened_by_pillow(file: BinaryIO) -> Image.Image | None:
    """The image, where Pillow reads all that is in the file."""
    try:
        image = photograph.opened(file)
        pages = image.n_frames
    except (OSError, SyntaxError):  # the latter for pixels that it has no mode for
        return None
    bits = image.tag_v2.get(BITS, (1,))
    interleaved = image.tag_v2.get(PLANAR, 1) == 1 or len(bits) == 1
    whole = pages == 1 and NODATA not in image.tag_v2
    return image if max(bits) <= 8 and len(bits) in (1, 3, 4) and interleaved and whole else None


def _image_of(tiff: Any, reading: Reading) -> OpenImage:
    """The image in the first series of an open file. Raises OSError where there are others as large."""
    series = tiff.series[0]
    others = [s for s in tiff.series[1:] if math.prod(s.shape) >= math.prod(series.shape)]
    if others:
        raise OSError(f"holds {1 + len(others)} images: save each in a file of its own")
    sizes = {a: size for a, size in zip(series.axes, series.shape, strict=True) if size > 1 or a in "YX"}
    letters = "".join(sizes)
    if not {"Y", "X"} <= sizes.keys():
        raise OSError(f"has axes {series.axes}, which are no image's")
    reading.check_size(sizes["X"], sizes["Y"])
    name = series.dtype.name
    if name not in KNOWN:
        raise OSError(f"has {name} values: save it as one of {', '.join(DTYPES)}")
    pages = [letter for letter in letters if letter not in ("X", "Y", *CHANNELS)]
    count = math.prod(sizes[letter] for letter in pages)
    if count > 1 and reading.pages is None:
        raise OSError(f"has {count} pages (axes {letters}): --pages says what they are, channels or max")
    values = series.asarray().reshape(list(sizes.values()))
    order = [letters.index(letter) for letter in (*pages, "Y", "X", *(c for c in letters if c in CHANNELS))]
    values = values.transpose(order).reshape(count, sizes["Y"], sizes["X"], -1)
    if reading.pages == "max":
        values = values.max(0)
    values = np.moveaxis(values, 0, -2).reshape(sizes["Y"], sizes["X"], -1) if values.ndim == 4 else values
    tag = tiff.pages[0].tags.get(NODATA)
    return ArrayImage(values, reading, None if tag is None else float(str(tag.value).strip("\0 ")))
