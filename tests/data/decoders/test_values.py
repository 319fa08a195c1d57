"""That values arrive as they are stored, from every kind of file: against numpy, tifffile and imagecodecs."""

import io
import sys

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading, resampled

TWELVE_BITS = (np.arange(16384) % 4096).astype(np.uint16).reshape(128, 128)


def read(path, reading, box=None):
    """An image, or a box of it, at its own resolution."""
    image = open_image(path, reading)
    box = box or (0, 0, *image.size)
    return image.resized_crop(box, (box[3] - box[1], box[2] - box[0])).numpy()


@pytest.mark.parametrize("offset", [0, 32768])
@pytest.mark.parametrize("kind", ["png", "none", "lzw", "zstd", "deflate", "bigtiff", "tiled", "big-endian", "npy"])
def test_sixteen_bits_keep_all_levels(tmp_path, kind, offset):
    values, path = TWELVE_BITS + np.uint16(offset), tmp_path / f"x.{kind}"
    if kind == "png":
        Image.fromarray(values).save(path, format="PNG")
    elif kind == "npy":
        np.save(path, values)
        path = path if path.exists() else tmp_path / "x.npy.npy"
    else:
        options = {"bigtiff": {"bigtiff": True}, "tiled": {"tile": (32, 48)}, "big-endian": {"byteorder": ">"}}
        chosen = options.get(kind, {"compression": kind if kind != "none" else None})
        tifffile.imwrite(path, values, **chosen)
    found = read(path, Reading(1, "uint16"))
    assert found.dtype == np.uint16
    assert np.array_equal(found[..., 0], values)
    assert len(np.unique(found)) == 4096
    assert np.array_equal(read(path, Reading(1, "uint16"), (3, 5, 40, 100))[..., 0], values[5:100, 3:40])


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    "layout",
    [{"tile": (32, 48)}, {"rowsperstrip": 7}, {"rowsperstrip": 7, "compression": "lzw"}, {}, {"bigtiff": True}],
)
def test_boxes_of_a_tiff_are_those_of_the_whole(tmp_path, layout, planar):
    """Each box decodes its own tiles or strips, from a file, and from bytes that can't be mapped."""
    values = np.random.default_rng(5).integers(0, 65536, (3, 100, 130)).astype(np.uint16)
    stored = values if planar else np.moveaxis(values, 0, -1)
    layout = {"compression": "deflate"} | layout if "tile" in layout else layout
    order = {"photometric": "rgb", "planarconfig": "separate" if planar else "contig"}
    tifffile.imwrite(tmp_path / "x.tif", stored, **order, **layout)
    rng = np.random.default_rng(6)
    for _ in range(40):
        left, right = sorted(rng.choice(131, 2, replace=False).tolist())
        top, bottom = sorted(rng.choice(101, 2, replace=False).tolist())
        expected = np.moveaxis(values[:, top:bottom, left:right], 0, -1)
        with (tmp_path / "x.tif").open("rb") as file:
            assert np.array_equal(read(file, Reading(3, "uint16"), (left, top, right, bottom)), expected)
        assert np.array_equal(read(tmp_path / "x.tif", Reading(3, "uint16"), (left, top, right, bottom)), expected)


def test_only_the_tiles_of_a_box_are_decoded(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "x.tif", TWELVE_BITS, tile=(16, 16), compression="deflate")
    image, decoded = open_image(tmp_path / "x.tif", Reading(1, "uint16")), []
    page = image.values.stack.values.pages[0]
    tile = page._tile
    monkeypatch.setattr(page, "_tile", lambda number: decoded.append(number) or tile(number))
    image.resized_crop((17, 33, 49, 47), (14, 32))
    assert decoded == [17, 18, 19]


@pytest.mark.parametrize("dtype", ["int16", "int32", "float16", "float32", "float64"])
def test_signed_and_floating_values_are_kept(tmp_path, dtype):
    values = np.array([[-1000, 40, 1000], [0, 7, -3]], dtype)
    tifffile.imwrite(tmp_path / "x.tif", values)
    np.save(tmp_path / "x.npy", values)
    expected = values.astype("float32") if dtype == "float64" else values
    for suffix in ("tif", "npy"):
        found = read(tmp_path / f"x.{suffix}", Reading(1, expected.dtype.name))
        assert found.dtype == expected.dtype
        assert np.array_equal(found[..., 0], expected)


@pytest.mark.parametrize("options", [{"compression": "deflate"}, {}, {"planarconfig": "contig"}])
def test_thirteen_channels_in_their_order(tmp_path, options):
    planes = np.random.default_rng(0).integers(0, 60000, (13, 20, 30)).astype(np.uint16)
    given = np.moveaxis(planes, 0, -1) if options.get("planarconfig") == "contig" else planes
    layout = {"planarconfig": "separate"} | options | {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "x.tif", given, **layout)
    np.save(tmp_path / "first.npy", planes)
    np.save(tmp_path / "last.npy", np.moveaxis(planes, 0, -1))
    for name in ("x.tif", "first.npy", "last.npy"):
        assert np.array_equal(read(tmp_path / name, Reading(13, "uint16")), np.moveaxis(planes, 0, -1)), name
        some = read(tmp_path / name, Reading(3, "uint16", channels=(8, 1, 13)))
        assert np.array_equal(some, np.moveaxis(planes[[7, 0, 12]], 0, -1)), name
    with pytest.raises(OSError, match="has 13 channels, not 3"):
        read(tmp_path / "x.tif", Reading(3, "uint16"))
    with pytest.raises(OSError, match="has 13 channels, and channel 14 is to be read"):
        read(tmp_path / "x.tif", Reading(1, "uint16", channels=(14,)))


@pytest.mark.parametrize("planar", [False, True])
def test_sixteen_bit_colour(tmp_path, planar):
    colour = np.random.default_rng(1).integers(0, 65536, (24, 17, 3)).astype(np.uint16)
    stored = np.moveaxis(colour, -1, 0) if planar else colour
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="rgb", planarconfig="separate" if planar else "contig")
    assert np.array_equal(read(tmp_path / "x.tif", Reading(3, "uint16")), colour)
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(colour))
    assert np.array_equal(read(tmp_path / "x.png", Reading(3, "uint16")), colour)
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(colour)[:300])
    with pytest.raises(OSError, match="a damaged PNG"):
        read(tmp_path / "x.png", Reading(3, "uint16"))


def test_pages_are_never_silently_the_first(tmp_path):
    stack = np.random.default_rng(2).integers(0, 4096, (6, 20, 30)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", stack, photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(OSError, match=r"has 6 pages \(axes ZYX\): --pages says what they are, channels, max or images"):
        open_image(tmp_path / "x.tif", Reading(1, "uint16"))
    found = read(tmp_path / "x.tif", Reading(6, "uint16", pages="channels"))
    assert np.array_equal(found, np.moveaxis(stack, 0, -1))
    found = read(tmp_path / "x.tif", Reading(1, "uint16", pages="max"))
    assert np.array_equal(found[..., 0], stack.max(0))
    times = np.stack([stack, stack[::-1]])  # six pages of two channels
    tifffile.imwrite(tmp_path / "y.tif", times, photometric="minisblack", metadata={"axes": "CZYX"}, ome=True)
    found = read(tmp_path / "y.tif", Reading(12, "uint16", pages="channels"))
    pages = times.transpose(1, 0, 2, 3).reshape(12, 20, 30)
    assert np.array_equal(found, np.moveaxis(pages, 0, -1))
    found = read(tmp_path / "y.tif", Reading(2, "uint16", pages="max"))
    assert np.array_equal(found, np.moveaxis(times.max(1), 0, -1))


def test_photographs_of_several_pages(tmp_path):
    pages = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(3)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(OSError, match=r"3 pages|holds 3 images"):
        open_image(tmp_path / "x.tif", Reading())


def test_missing_values(tmp_path):
    values = np.random.default_rng(3).normal(1500, 300, (40, 60)).astype(np.float32)
    values[3, 4], values[5, 6], values[:, 50:] = np.inf, np.nan, -9999
    tifffile.imwrite(tmp_path / "plain.tif", values)
    tag = [(42113, "s", 0, "-9999", True)]
    tifffile.imwrite(tmp_path / "nodata.tif", values, extratags=tag)
    for path, reading in (
        (tmp_path / "plain.tif", Reading(1, "float32", nodata=-9999)),
        (tmp_path / "nodata.tif", Reading(1, "float32")),
    ):
        found = read(path, reading)[..., 0]
        absent = ~np.isfinite(values) | (values == -9999)
        assert np.array_equal(np.isnan(found), absent)
        assert np.array_equal(found[~absent], values[~absent])
    whole = np.arange(2400, dtype=np.uint16).reshape(40, 60)
    tifffile.imwrite(tmp_path / "whole.tif", whole, extratags=[(42113, "s", 0, "0", True)])
    image = open_image(tmp_path / "whole.tif", Reading(1, "float32"))
    assert image.dtype == "float32"
    found = read(tmp_path / "whole.tif", Reading(1, "float32"))[..., 0]
    assert np.array_equal(np.nan_to_num(found), whole)
    assert np.isnan(found).sum() == 1


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "float16", "float32"])
def test_resizing_is_that_of_torch_in_float64(dtype):
    rng = np.random.default_rng(4)
    crop = (rng.random((37, 53, 2)) * 3000 + 100).astype(dtype)
    exact = torch.from_numpy(crop.astype(np.float64)).movedim(-1, 0)[None]
    exact = torch.nn.functional.interpolate(exact, (16, 24), mode="bicubic", antialias=True)[0].movedim(0, -1).numpy()
    found = resampled(crop, (16, 24)).numpy()
    assert found.dtype == crop.dtype
    error = np.abs(found.astype(np.float64) - exact).max()
    assert error <= {"float16": 2, "float32": 1e-2}.get(dtype, 0.51)
    large = np.full((8, 8, 1), 2**30 + 1, np.int32)
    assert (resampled(large, (4, 4)) == 2**30 + 1).all()


def test_resizing_leaves_missing_values_out():
    crop = np.full((32, 32, 1), 7.0, np.float32)
    crop[:, :16] = np.nan
    found = resampled(crop, (8, 8))[..., 0]
    assert torch.isnan(found[:, :3]).all()
    torch.testing.assert_close(found[:, 5:], torch.full((8, 3), 7.0))
    assert torch.isnan(resampled(np.full((8, 8, 1), np.nan, np.float32), (4, 4))).all()


def test_what_does_not_fit_is_said(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((8, 8), np.uint16))
    with pytest.raises(OSError, match="has uint16 values, not uint8"):
        read(tmp_path / "x.npy", Reading())
    np.save(tmp_path / "x.npy", np.zeros((8, 8), np.int64))
    with pytest.raises(OSError, match="has int64 values: save it as one of uint8, uint16"):
        read(tmp_path / "x.npy", Reading())
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(OSError, match=r"has 2 pages: --pages says what they are"):
        read(tmp_path / "x.npy", Reading())
    np.save(tmp_path / "x.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(OSError, match="no array that can be read"):
        read(tmp_path / "x.npy", Reading())
    np.save(tmp_path / "x.npy", np.zeros((200, 300), np.uint8))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:1000])
    for file in (tmp_path / "x.npy", (tmp_path / "x.npy").open("rb")):
        with pytest.raises(OSError, match="no array that can be read"):
            read(file, Reading(1))
    np.save(tmp_path / "x.npy", np.zeros((200, 300), np.uint8))
    with pytest.raises(OSError, match=r"more than the 0.01 of --max-megapixels"):
        read(tmp_path / "x.npy", Reading(1, max_megapixels=0.01))
    tifffile.imwrite(tmp_path / "x.tif", TWELVE_BITS)
    (tmp_path / "x.tif").write_bytes((tmp_path / "x.tif").read_bytes()[:900])
    with pytest.raises(OSError, match=r".+"):
        read(tmp_path / "x.tif", Reading(1, "uint16"))
    with pytest.raises(OSError, match="has 3 channels, not 5"):
        read(Image.new("RGB", (8, 8)), Reading(5))
    with pytest.raises(OSError, match="has uint8 values, not uint16"):
        read(Image.new("RGB", (8, 8)), Reading(3, "uint16"))


@pytest.mark.parametrize(("name", "needed"), [("x.tif", "tifffile"), ("x.png", "imagecodecs")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name, needed):
    tifffile.imwrite(tmp_path / "x.tif", TWELVE_BITS)
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(np.zeros((8, 8, 3), np.uint16)))
    monkeypatch.setitem(sys.modules, needed, None)
    with pytest.raises(OSError, match=rf"needs {needed}: pip install tifffile imagecodecs zarr \(the extra micro"):
        open_image(tmp_path / name, Reading())


def test_arrays_are_mapped_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10000, dtype=np.uint16).reshape(100, 100))
    with (tmp_path / "x.npy").open("rb") as file:
        image = open_image(file, Reading(1, "uint16"))
    assert isinstance(image.values.stack.values, np.memmap)
    assert image.resized_crop((1, 2, 3, 4), (2, 2)).flatten().tolist() == [201, 202, 301, 302]  # the file is closed
    np.save(buffer := io.BytesIO(), np.ones((4, 4), np.uint8))
    buffer.seek(0)
    assert open_image(buffer, Reading(1)).size == (4, 4)


def test_no_data_that_a_type_can_not_hold_matches_nothing(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for tag in ("-9999", "256", "nan", "", "0.5"):
        tifffile.imwrite(tmp_path / "x.tif", values, extratags=[(42113, "s", 0, tag, True)])
        assert np.array_equal(read(tmp_path / "x.tif", Reading(1))[..., 0], values), tag
    found = read(tmp_path / "x.tif", Reading(1, "float32", nodata=-9999))
    assert np.array_equal(found[..., 0], values)
    np.save(tmp_path / "x.npy", np.array([[1.5, -1.797e308, 2.5]]))
    found = read(tmp_path / "x.npy", Reading(1, "float32"))[0, :, 0]
    assert (found[0], np.isnan(found[1]), found[2]) == (1.5, True, 2.5)


def test_no_data_of_photographs(tmp_path):
    values = np.random.default_rng(0).integers(1, 256, (8, 9, 3)).astype(np.uint8)
    values[:3] = 0
    Image.fromarray(values).save(tmp_path / "x.png")
    image = open_image(tmp_path / "x.png", Reading(3, "float32", nodata=0))
    assert (image.dtype, image.in_chans) == ("float32", 3)
    found = read(tmp_path / "x.png", Reading(3, "float32", nodata=0))
    assert np.isnan(found[:3]).all()
    assert np.array_equal(found[3:], values[3:])


def test_eight_bits_that_are_no_photograph(tmp_path):
    """A fourth band that is no transparency, and signed values."""
    bands = np.random.default_rng(0).integers(0, 256, (8, 9, 4)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", bands, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(read(tmp_path / "x.tif", Reading(4)), bands)
    assert np.array_equal(read(tmp_path / "x.tif", Reading(3, channels=(4, 3, 2))), bands[..., [3, 2, 1]])
    tifffile.imwrite(tmp_path / "x.tif", bands.astype(np.int8), photometric="minisblack", planarconfig="contig")
    with pytest.raises(OSError, match="has int8 values: save it as one of"):
        open_image(tmp_path / "x.tif", Reading(4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bits_are_turned_as_eight_are(tmp_path, orientation):
    values = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint16)
    tag = [(274, "H", 1, orientation, True)]
    for name, options in (("plain", {}), ("packed", {"compression": "lzw"})):
        tifffile.imwrite(tmp_path / "deep.tif", values, extratags=tag, **options)
        tifffile.imwrite(tmp_path / "flat.tif", values.astype(np.uint8), extratags=tag, **options)
        deep, flat = read(tmp_path / "deep.tif", Reading(1, "uint16")), read(tmp_path / "flat.tif", Reading(1))
        assert np.array_equal(deep, flat), name


def test_values_that_pillow_would_not_keep_are_refused(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5\n# a camera\n4 2\n4095\n" + bytes(16))
    (tmp_path / "x.ppm").write_bytes(b"P6 4 2 65535\n" + bytes(48))
    colour = np.random.default_rng(0).integers(0, 4096, (16, 16, 3)).astype(np.uint16)
    (tmp_path / "x.jp2").write_bytes(imagecodecs.jpeg2k_encode(colour, codecformat="jp2", level=0))
    (tmp_path / "x.j2k").write_bytes(imagecodecs.jpeg2k_encode(colour, codecformat="j2k", level=0))
    for name, greatest in (("x.pgm", 4095), ("x.ppm", 65535), ("x.jp2", 65535), ("x.j2k", 65535)):
        with pytest.raises(OSError, match=f"values up to {greatest} in .*, which would not be kept: save it as"):
            open_image(tmp_path / name, Reading())
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    (tmp_path / "y.pgm").write_bytes(b"P5 8 8 65535\n" + grey.astype(">u2").tobytes())
    assert np.array_equal(read(tmp_path / "y.pgm", Reading(1, "int32"))[..., 0], grey)
    (tmp_path / "y.ppm").write_bytes(b"P6 4 2 255\n" + bytes(24))
    assert read(tmp_path / "y.ppm", Reading()).shape == (2, 4, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bit_colour_is_upright(tmp_path, orientation):
    """As Pillow turns the same pixels in 8 bits."""
    values = np.random.default_rng(0).integers(0, 256, (4, 8, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(values).save(tmp_path / "x.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))).astype(np.uint16) * 257
    eight = (tmp_path / "x.png").read_bytes()
    place = eight.index(b"eXIf") - 4
    chunk = eight[place : place + 12 + int.from_bytes(eight[place : place + 4], "big")]
    sixteen = imagecodecs.png_encode(values.astype(np.uint16) * 257)
    (tmp_path / "x.png").write_bytes(sixteen[:33] + chunk + sixteen[33:])
    found = read(tmp_path / "x.png", Reading(3, "uint16"))
    assert np.array_equal(found, expected)


def test_resampled_half_floats_stay_finite(tmp_path):
    values = np.where(np.arange(64) % 8 < 4, 65504, -65504).astype(np.float16) * np.ones((64, 1), np.float16)
    np.save(tmp_path / "x.npy", values)
    with open(tmp_path / "x.npy", "rb") as file:
        found = open_image(file, Reading(1, "float16")).resized_crop((0, 0, 64, 64), (96, 96))
    assert found.isfinite().all()
    assert found.abs().max() == 65504
