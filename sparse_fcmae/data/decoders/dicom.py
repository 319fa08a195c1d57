"""DICOM files, read by pydicom: CT and MR slices, X-rays, ultrasound."""

from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np

from sparse_fcmae.data.decoders.image import OpenImage, Reading, library
from sparse_fcmae.data.decoders.pages import open_stack

PREAMBLE, MAGIC = 128, b"DICM"


def recognises(head: bytes) -> bool:
    """Whether a file that begins so is a DICOM file."""
    return head[PREAMBLE : PREAMBLE + len(MAGIC)] == MAGIC


def open_image(file: BinaryIO, reading: Reading) -> OpenImage:
    """The image in a file, in the units that its slope and intercept give, such as Hounsfield's.

    Light is high: where a file says that its least values are white, they are turned round. Raises OSError where there
    is no image, or one that can't be decoded.
    """
    pydicom = library("pydicom", "medical")
    try:
        data = pydicom.dcmread(file)
        reading.check_size(data.Columns, data.Rows)
        frames, alone = int(data.get("NumberOfFrames") or 1), reading.pages == "images"
        values = _values(data, (reading.page or 0) if alone else None)
    except OSError:
        raise
    except Exception as error:  # of attributes that are missing, and of each decoder
        raise OSError(f"no image in this DICOM file that can be read: {error}") from None
    values = values.reshape(-1, data.Rows, data.Columns, data.get("SamplesPerPixel", 1))
    if alone and frames > 1 and reading.page is None:
        raise OSError(f"has {frames} frames, each an image: say which is meant, counted from 0, as page=0")
    image = open_stack(values, replace(reading, page=0) if alone else reading, "frames")
    image.pages = frames
    return image


def _values(data: Any, frame: int | None) -> np.ndarray:
    """The values of a data set's frames or of one, integers where slope and intercept are."""
    stored = library("pydicom.pixels", "medical").pixel_array(data, index=frame)
    if data.get("SamplesPerPixel", 1) != 1:
        return stored  # in RGB, as pydicom converts YBR
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    low, high = (-(1 << data.BitsStored - 1), (1 << data.BitsStored - 1) - 1)
    if not data.PixelRepresentation:
        low, high = 0, (1 << data.BitsStored) - 1
    if data.PhotometricInterpretation == "MONOCHROME1":
        stored = low + high - stored.astype(np.int64)
    if not (slope.is_integer() and intercept.is_integer()):
        return (stored * np.float64(slope) + intercept).astype(np.float32)
    ends = sorted((int(low * slope + intercept), int(high * slope + intercept)))
    fitting = (np.uint8, np.uint16) if ends[0] >= 0 else (np.int16,)
    dtype = next((d for d in fitting if np.iinfo(d).min <= ends[0] and ends[1] <= np.iinfo(d).max), np.int32)
    return (stored.astype(np.int64) * int(slope) + int(intercept)).astype(dtype)
