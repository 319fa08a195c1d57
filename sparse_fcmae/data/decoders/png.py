"""PNG files of 16 bits in colour or with an alpha channel, of which Pillow reads 8."""

from typing import BinaryIO

import numpy as np

from sparse_fcmae.data.decoders.image import ArrayImage, OpenImage, Reading, library

MAGIC = b"\x89PNG\r\n\x1a\n"
DEPTH, KIND = 24, 25  # where a file says how many bits a value has, and what a pixel has
SIXTEEN_BITS, GREY = 16, 0


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is a PNG of 16 bits and several channels."""
    return head.startswith(MAGIC) and len(head) > KIND and head[DEPTH] == SIXTEEN_BITS and head[KIND] != GREY


def open_image(file: BinaryIO, reading: Reading) -> OpenImage:
    """The image in a file. An alpha channel counts as a channel."""
    codec = library("imagecodecs", "microscopy")
    try:
        values = codec.png_decode(file.read())
    except codec.PngError as error:
        raise OSError(f"a damaged PNG: {error}") from None
    return ArrayImage(np.atleast_3d(values), reading)
