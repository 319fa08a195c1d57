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

    Light is high: where a file says that its least values are white, they are turned round. Padding is missing. Raises
    OSError where there is no image, one in palette colours, or one that can't be decoded.
    """
    pydicom = library("pydicom", "medical")
    try:
        data = pydicom.dcmread(file)
        reading.check_size(data.Columns, data.Rows)
        if data.PhotometricInterpretation == "PALETTE COLOR":
            raise OSError("has palette colours: save it in grey or RGB")
        frames, alone = int(data.get("NumberOfFrames") or 1), reading.pages == "images"
        values = _values(data, frames, (reading.page or 0) if alone else None)
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


def _values(data: Any, frames: int, frame: int | None) -> np.ndarray:
    """The values of a data set's frames or of one: integers where slopes and intercepts are and nothing is missing."""
    stored = library("pydicom.pixels", "medical").pixel_array(data, index=frame)
    if data.get("SamplesPerPixel", 1) != 1:
        return stored  # in RGB, as pydicom converts YBR
    rescales = [_rescale(data, number) for number in range(frames)]
    low, high = (-(1 << data.BitsStored - 1), (1 << data.BitsStored - 1) - 1)
    if not data.PixelRepresentation:
        low, high = 0, (1 << data.BitsStored) - 1
    absent = _padding(data, stored)
    if data.PhotometricInterpretation == "MONOCHROME1":
        stored = low + high - stored.astype(np.int64)
    of_each = np.array(rescales if frame is None else rescales[frame : frame + 1]).reshape(-1, 1, 1, 2)
    slope, intercept = of_each[..., 0], of_each[..., 1]
    exact = stored.reshape(-1, *stored.shape[-2:]) * slope + intercept
    if absent is not None:
        return np.where(absent.reshape(exact.shape), np.nan, exact).astype(np.float32)
    if not all(number.is_integer() for rescale in rescales for number in rescale):
        return exact.astype(np.float32)
    ends = [end * s + i for s, i in rescales for end in (low, high)]
    fitting = (np.uint8, np.uint16) if min(ends) >= 0 else (np.int16,)
    limits = ((d, np.iinfo(d)) for d in (*fitting, np.int32))
    dtype = next((d for d, limit in limits if limit.min <= min(ends) and max(ends) <= limit.max), None)
    if dtype is None and max(abs(exact.min()), abs(exact.max())) > np.iinfo(np.int32).max:
        raise OSError(f"has values from {exact.min():g} to {exact.max():g}, beyond 32 bits")
    return exact.astype(dtype or np.int32)


def _rescale(data: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept of a frame: those of its functional groups, of the shared ones, or of the whole file."""
    of_frames, shared = (data.get(f"{of}FunctionalGroupsSequence") or [] for of in ("PerFrame", "Shared"))
    for group in (*of_frames[frame : frame + 1], *shared[:1]):
        for found in group.get("PixelValueTransformationSequence") or []:
            return float(found.RescaleSlope), float(found.RescaleIntercept)
    return float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))


def _padding(data: Any, stored: np.ndarray) -> np.ndarray | None:
    """Where stored values are padding, None where a file declares none."""
    first = data.get("PixelPaddingValue")
    if first is None:
        return None
    ends = sorted((int(first), int(data.get("PixelPaddingRangeLimit", first))))
    return (stored >= ends[0]) & (stored <= ends[1])
