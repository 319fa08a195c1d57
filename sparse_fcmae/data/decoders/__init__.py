"""From an image's file to its pixels. Each kind of file is one module in this folder, chosen by what the file holds."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from sparse_fcmae.data.decoders import arrays, dicom, ome_zarr, photograph, png, tiff
from sparse_fcmae.data.decoders.arrays import InMemory
from sparse_fcmae.data.decoders.image import OpenImage, Reading
from sparse_fcmae.data.decoders.ome_zarr import ZarrFolder
from sparse_fcmae.data.decoders.pages import Page
from sparse_fcmae.data.decoders.together import ChannelsTogether, FilesTogether

HEAD = 132  # bytes that tell the kind
EXTENSIONS = (".npy", ".npz", ".btf", ".tf8", ".dcm", ".dicom", ome_zarr.EXTENSION)  # that Pillow does not know
File = BinaryIO | ZarrFolder | Page | OpenImage | InMemory | str | os.PathLike | Image.Image | np.ndarray


def open_image(file: File, reading: Reading) -> OpenImage:
    """An image whose size, channels and dtype are known, and whose pixels are read when they are asked for.

    file: its bytes, what stands in their place, where they are, an image that is open already, or an array. Raises
    OSError for what is no image, for one that is larger than `reading` allows, and MissingLibrary for one that needs a
    library.
    """
    if isinstance(file, OpenImage):
        return file
    if isinstance(file, InMemory):
        file = file.image
    if isinstance(file, Image.Image):
        return photograph.from_pillow(file, reading)
    if isinstance(file, np.ndarray):
        return arrays.of_array(file, reading)
    if isinstance(file, FilesTogether):
        return ChannelsTogether(file.files, reading, open_image)
    if isinstance(file, Page):
        return open_image(file.file, replace(reading, page=file.number))
    if isinstance(file, str | os.PathLike):
        file = ZarrFolder(Path(file)) if os.path.isdir(file) else io.BytesIO(Path(file).read_bytes())
    if isinstance(file, ZarrFolder):
        return ome_zarr.open_image(file, reading)
    stream = file
    head = stream.read(HEAD)
    stream.seek(0)
    for decoder in (dicom, arrays, tiff, png):  # DICOM first, as such a file may begin as a TIFF
        if decoder.recognises(head):
            return decoder.open_image(stream, reading)
    return photograph.open_image(stream, head, reading)
