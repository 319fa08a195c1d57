"""From an image's file to its pixels. Each kind of file is one module in this folder, chosen by what the file holds."""

import io
import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from sparse_fcmae.data.decoders import arrays, dicom, photograph, png, tiff
from sparse_fcmae.data.decoders.image import OpenImage, Reading
from sparse_fcmae.data.decoders.together import ChannelsTogether, FilesTogether

HEAD = 132  # bytes that tell the kind
File = BinaryIO | str | os.PathLike | Image.Image  # an image's bytes, where they are, or one that Pillow has open
NOT_PILLOWS = (".npy", ".btf", ".tf8", ".dcm", ".dicom")  # extensions of what is read here and is not known to Pillow


def open_image(file: File, reading: Reading) -> OpenImage:
    """An image whose size, channels and dtype are known, and whose pixels are read when they are asked for.

    Raises OSError for what is no image, for one that is larger than `reading` allows, and MissingLibrary for one that a
    library is needed for.
    """
    if isinstance(file, Image.Image):
        return photograph.from_pillow(file, reading)
    if isinstance(file, FilesTogether):
        return ChannelsTogether(file.files, reading, open_image)
    stream = io.BytesIO(Path(file).read_bytes()) if isinstance(file, str | os.PathLike) else file
    head = stream.read(HEAD)
    stream.seek(0)
    for decoder in (arrays, tiff, png, dicom):
        if decoder.recognises(head):
            return decoder.open_image(stream, reading)
    return photograph.open_image(stream, head, reading)
