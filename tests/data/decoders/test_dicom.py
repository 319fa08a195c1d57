"""DICOM files against the numbers that they were made of."""

import sys
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading


def write(path, stored, *, bits=None, signed=False, photometric="MONOCHROME2", compress=False, **attributes):
    """A file of stored values [H, W], [frames, H, W] or, in colour, [H, W, 3]."""
    colour = photometric == "RGB"
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Rows, data.Columns = stored.shape[:2] if colour else stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour:
        data.PlanarConfiguration = 0
    if stored.ndim == 3 and not colour:
        data.NumberOfFrames = len(stored)
    data.BitsAllocated = 8 * stored.dtype.itemsize
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(signed)
    for name, value in attributes.items():
        setattr(data, name, value)
    data.PixelData = stored.tobytes()
    if compress:
        data.compress(RLELossless, generate_instance_uid=False)
    data.save_as(path, enforce_file_format=True)


def read(path, reading):
    image = open_image(path, reading)
    return image.resized_crop((0, 0, *image.size), image.size[::-1]).numpy()


CT = np.array([[0, 1064, 2024], [4095, 500, 24]], np.uint16)


@pytest.mark.parametrize("compress", [False, True])
def test_hounsfield_units(tmp_path, compress):
    write(tmp_path / "x.dcm", CT, bits=12, RescaleSlope=1, RescaleIntercept=-1024, compress=compress)
    found = read(tmp_path / "x.dcm", Reading(1, "int16"))
    assert found.dtype == np.int16
    assert np.array_equal(found[..., 0], CT.astype(int) - 1024)


def test_types(tmp_path):
    signed = np.array([[-1000, 40, 1000]], np.int16)
    for stored, options, dtype, expected in (
        (CT, {"bits": 12}, "uint16", CT),
        (CT.astype(np.uint8), {}, "uint8", CT.astype(np.uint8)),
        (signed, {"signed": True}, "int16", signed),
        (CT, {"RescaleSlope": 1, "RescaleIntercept": -1024}, "int32", CT.astype(int) - 1024),
        (CT, {"RescaleSlope": 0.5, "RescaleIntercept": 2}, "float32", CT * np.float32(0.5) + 2),
        (CT, {"bits": 12, "photometric": "MONOCHROME1"}, "uint16", 4095 - CT),
        (signed, {"signed": True, "photometric": "MONOCHROME1"}, "int16", -1 - signed),
    ):
        write(tmp_path / "x.dcm", stored, **options)
        found = read(tmp_path / "x.dcm", Reading(1, dtype))
        assert (found.dtype, found[..., 0].tolist()) == (np.dtype(dtype), expected.tolist())


def test_colour_and_frames(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    write(tmp_path / "x.dcm", colour, photometric="RGB")
    assert np.array_equal(read(tmp_path / "x.dcm", Reading(3)), colour)
    frames = np.random.default_rng(1).integers(0, 4096, (4, 8, 6)).astype(np.uint16)
    write(tmp_path / "x.dcm", frames, bits=12)
    with pytest.raises(OSError, match="has 4 frames: --pages says what they are, channels, max or images"):
        open_image(tmp_path / "x.dcm", Reading(1, "uint16"))
    assert np.array_equal(read(tmp_path / "x.dcm", Reading(4, "uint16", pages="channels")), np.moveaxis(frames, 0, -1))
    assert np.array_equal(read(tmp_path / "x.dcm", Reading(1, "uint16", pages="max"))[..., 0], frames.max(0))


def test_what_can_not_be_read_is_said(tmp_path, monkeypatch):
    write(tmp_path / "x.dcm", CT)
    data = pydicom.dcmread(tmp_path / "x.dcm")
    del data.PixelData
    data.save_as(tmp_path / "none.dcm")
    with pytest.raises(OSError, match=r"no image in this DICOM file that can be read: .*pixel data"):
        open_image(tmp_path / "none.dcm", Reading())
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "x.dcm").read_bytes()[:-6])
    with pytest.raises(OSError, match="no image in this DICOM file that can be read"):
        open_image(tmp_path / "cut.dcm", Reading())
    with pytest.raises(OSError, match="more than the 1e-06 of --max-megapixels"):
        open_image(tmp_path / "x.dcm", Reading(max_megapixels=1e-6))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(OSError, match=r"needs pydicom: pip install pydicom \(the extra medical\)"):
        open_image(tmp_path / "x.dcm", Reading())


def groups(slope, intercept):
    """A functional group with a slope and an intercept."""
    values = pydicom.Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, intercept, "HU"
    group = pydicom.Dataset()
    group.PixelValueTransformationSequence = [values]
    return group


def test_slopes_of_functional_groups(tmp_path):
    """As enhanced files have them: one for all frames, or one for each."""
    stored = np.arange(8, dtype=np.uint16).reshape(2, 2, 2)
    shared = {"SharedFunctionalGroupsSequence": [groups(2, -1024)], "RescaleSlope": 7}
    write(tmp_path / "x.dcm", stored, **shared)
    reading = Reading(1, "int16", pages="images")
    found = read(tmp_path / "x.dcm", replace(reading, dtype="int32", page=1))
    assert found[..., 0].tolist() == [[-1016, -1014], [-1012, -1010]]
    each = {"PerFrameFunctionalGroupsSequence": [groups(1, 0), groups(100, -5)]}
    write(tmp_path / "x.dcm", stored, bits=6, **shared, **each)
    for page, expected in ((0, stored[0]), (1, stored[1] * 100 - 5)):
        assert np.array_equal(read(tmp_path / "x.dcm", replace(reading, page=page))[..., 0], expected)
    both = read(tmp_path / "x.dcm", Reading(2, "int16", pages="channels"))
    assert np.array_equal(both, np.stack([stored[0], stored[1] * 100 - 5], -1))
    write(tmp_path / "x.dcm", stored, **{"PerFrameFunctionalGroupsSequence": [groups(1, 0), groups(0.5, 0)]})
    assert np.array_equal(read(tmp_path / "x.dcm", replace(reading, dtype="float32", page=1))[..., 0], stored[1] / 2)
    write(tmp_path / "x.dcm", stored + 65000, RescaleSlope="1000000")
    with pytest.raises(OSError, match=r"has values from 6.5e.10 to .*, beyond 32 bits"):
        read(tmp_path / "x.dcm", replace(reading, page=0))


def test_padding_is_missing(tmp_path):
    stored = np.array([[-2000, 3], [-1999, 5]], np.int16)
    padding = {"PixelPaddingValue": -2000, "RescaleSlope": 2, "RescaleIntercept": -10}
    write(tmp_path / "x.dcm", stored, signed=True, **padding)
    found = read(tmp_path / "x.dcm", Reading(1, "float32"))[..., 0]
    assert np.array_equal(found, np.array([[np.nan, -4], [-4008, 0]], np.float32), equal_nan=True)
    write(tmp_path / "x.dcm", stored, signed=True, **padding, PixelPaddingRangeLimit=-1500)
    found = read(tmp_path / "x.dcm", Reading(1, "float32"))[..., 0]
    assert np.array_equal(found, np.array([[np.nan, -4], [np.nan, 0]], np.float32), equal_nan=True)
    stored = np.array([[0, 3], [255, 5]], np.uint8)
    write(tmp_path / "x.dcm", stored, photometric="MONOCHROME1", PixelPaddingValue=0)
    found = read(tmp_path / "x.dcm", Reading(1, "float32"))[..., 0]
    assert np.array_equal(found, np.array([[np.nan, 252], [0, 250]], np.float32), equal_nan=True)


def test_palette_colours_are_refused(tmp_path):
    write(tmp_path / "x.dcm", np.zeros((2, 2), np.uint8), photometric="PALETTE COLOR")
    with pytest.raises(OSError, match="has palette colours: save it in grey or RGB"):
        read(tmp_path / "x.dcm", Reading(1))
