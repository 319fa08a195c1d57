"""PNG files of 16 bits in colour or with an alpha channel, of which Pillow reads 8."""

from typing import BinaryIO

import numpy as np

from sparse_fcmae.data.decoders import photograph
from sparse_fcmae.data.decoders.image import TURNS, ArrayImage, OpenImage, Reading, library

MAGIC = b"\x89PNG\r\n\x1a\n"
DEPTH, KIND = 24, 25  # where a file says how many bits a value has, and what a pixel has
SIXTEEN_BITS, GREY = 16, 0


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is a PNG of 16 bits and several channels."""
    return head.startswith(MAGIC) and len(head) > KIND and head[DEPTH] == SIXTEEN_BITS and head[KIND] != GREY


def open_image(file: BinaryIO, reading: Reading) -> OpenImage:
    """The image in a file, upright. An alpha channel counts as a channel. Raises OSError for an animation."""
    codec = library("imagecodecs", "microscopy")
    try:
        values = np.atleast_3d(codec.png_decode(file.read()))
    except codec.PngError as error:
        raise OSError(f"a damaged PNG: {error}") from None
    file.seek(0)
    header = photograph.opened(file)
    if header.is_animated:
        raise OSError(f"has {header.n_frames} frames of 16 bits: save each as a file of its own")
    turn = TURNS.get(header.getexif().get(photograph.ORIENTATION, 1))
    return ArrayImage(turn(values) if turn else values, reading)
