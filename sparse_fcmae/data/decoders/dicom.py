"""DICOM files, read by pydicom: CT and MR slices, X-rays, ultrasound."""

from typing import Any, BinaryIO

import numpy as np

from sparse_fcmae.data.decoders.image import ArrayImage, OpenImage, Reading, library, of_pages

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
        values = _values(data)
    except OSError:
        raise
    except Exception as error:  # of attributes that are missing, and of each decoder
        raise OSError(f"no image in this DICOM file that can be read: {error}") from None
    frames = int(data.get("NumberOfFrames") or 1)
    values = values.reshape(frames, data.Rows, data.Columns, -1)
    return ArrayImage(of_pages(values, reading, "frames"), reading)


def _values(data: Any) -> np.ndarray:
    """The values of a data set, integers where slope and intercept are."""
    if data.get("SamplesPerPixel", 1) != 1:
        return data.pixel_array  # in RGB, as pydicom converts YBR
    stored, slope, intercept = (
        data.pixel_array,
        float(data.get("RescaleSlope", 1)),
        float(data.get("RescaleIntercept", 0)),
    )
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
