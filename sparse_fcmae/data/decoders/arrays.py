"""NumPy's .npy files, which are mapped, not read: an image each, its channels first or last."""

import io
from typing import BinaryIO

import numpy as np

from sparse_fcmae.data.decoders.image import ArrayImage, OpenImage, Reading
from sparse_fcmae.data.format import DTYPES

MAGIC = b"\x93NUMPY"
KNOWN = {*DTYPES, "float64"}


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is an array."""
    return head.startswith(MAGIC)


def open_image(file: BinaryIO, reading: Reading) -> OpenImage:
    """The array in a file. Raises OSError for one that is no image."""
    try:
        if isinstance(file, io.BytesIO):
            values = np.load(file, allow_pickle=False)
        else:
            np.lib.format.read_magic(file)
            file.seek(0)
            values = np.load(file.name, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise OSError(f"no array that can be read: {error}") from None
    if values.dtype.name not in KNOWN:
        raise OSError(f"has {values.dtype.name} values: save it as one of {', '.join(DTYPES)}")
    return ArrayImage(as_image(values), reading)


def as_image(values: np.ndarray) -> np.ndarray:
    """An array as [H, W, C]. Of three axes the shortest counts the channels, of equally short ones the last."""
    if values.ndim == 2:
        return values[..., None]
    if values.ndim != 3:
        raise OSError(f"has {values.ndim} axes {list(values.shape)}: an image has two, or three with its channels")
    channels = min(reversed(range(3)), key=lambda axis: values.shape[axis])
    return np.moveaxis(values, channels, -1)
