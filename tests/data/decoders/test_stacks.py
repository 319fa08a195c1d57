"""Files of several pages and arrays of several axes: the boxes of each kind, against numpy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
import torch
import zarr

from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.arrays import axes_of
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.views import NativeView

SCENES = Path(os.environ.get("SPARSE_FCMAE_SCENES", "no such folder"))  # .npy of [H, W, 13]
VALUES = np.random.default_rng(0).integers(0, 60000, (3, 2, 5, 40, 50)).astype(np.uint16)  # t, c, z, y, x
PAGES = VALUES.transpose(0, 2, 3, 4, 1).reshape(15, 40, 50, 2)
AXES = [{"name": "t", "type": "time"}, {"name": "colour", "type": "channel"}, *({"name": n} for n in "zyx")]


def box(path, reading, place=(3, 5, 41, 33)):
    left, top, right, bottom = place
    return open_image(path, reading).resized_crop(place, (bottom - top, right - left)).numpy()


def write_tiff(path, **layout):
    tifffile.imwrite(path, VALUES, photometric="minisblack", metadata={"axes": "TCZYX"}, **layout)


def write_ome_zarr(path, version):
    attributes = {"multiscales": [{"axes": AXES, "datasets": [{"path": "full"}, {"path": "half"}]}]}
    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    group.create_array("full", data=VALUES, chunks=(1, 1, 2, 16, 16))
    group.create_array("half", data=VALUES[..., ::2, ::2], chunks=(1, 1, 2, 16, 16))
    group.attrs.update(attributes if version == 2 else {"ome": attributes})


WRITERS = {
    "plain.ome.tif": lambda path: write_tiff(path, ome=True),
    "packed.ome.tif": lambda path: write_tiff(path, ome=True, compression="deflate", rowsperstrip=7),
    "tiled.ome.tif": lambda path: write_tiff(path, ome=True, compression="lzw", tile=(16, 32)),
    "two.zarr": lambda path: write_ome_zarr(path, 2),
    "three.zarr": lambda path: write_ome_zarr(path, 3),
}


@pytest.mark.parametrize("name", WRITERS)
def test_pages_and_channels_of_five_axes(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    place = slice(5, 33), slice(3, 41)
    found = box(path, Reading(30, "uint16", pages="channels"))
    assert np.array_equal(found, np.moveaxis(PAGES, 0, -2).reshape(40, 50, 30)[place])
    assert np.array_equal(box(path, Reading(2, "uint16", pages="max")), PAGES.max(0)[place])
    for page in (0, 7, 14):
        assert np.array_equal(box(path, Reading(2, "uint16", pages="images", page=page)), PAGES[page][place])
    some = box(path, Reading(1, "uint16", pages="images", page=3, channels=(2,)))
    assert np.array_equal(some, PAGES[3][place][..., 1:])
    with pytest.raises(OSError, match="has 15 pages"):
        open_image(path, Reading(2, "uint16"))


def test_only_the_page_and_the_strips_of_a_box_are_decoded(tmp_path, monkeypatch):
    write_tiff(tmp_path / "x.tif", compression="deflate", rowsperstrip=10)
    image = open_image(tmp_path / "x.tif", Reading(2, "uint16", pages="images", page=7))
    decoded = []
    for number, page in enumerate(image.values.stack.values.pages):
        tile = page._tile
        monkeypatch.setattr(page, "_tile", lambda n, tile=tile, number=number: decoded.append((number, n)) or tile(n))
    image.resized_crop((0, 12, 50, 28), (16, 50))
    assert decoded == [(12, 1), (12, 2), (17, 1), (17, 2)]  # page 7 is t = 1, z = 2, of 2 channels


@pytest.mark.parametrize("layout", [{}, {"compression": "deflate"}])
def test_images_whose_least_values_are_white_are_turned_round(tmp_path, layout):
    tifffile.imwrite(tmp_path / "x.tif", VALUES[0, 0, 0], photometric="miniswhite", **layout)
    assert np.array_equal(box(tmp_path / "x.tif", Reading(1, "uint16"))[..., 0], 65535 - VALUES[0, 0, 0, 5:33, 3:41])
    tag = [(42113, "s", 0, "7", True)]  # of values as they are stored
    tifffile.imwrite(tmp_path / "z.tif", np.arange(16, dtype=np.uint16).reshape(4, 4), photometric="miniswhite",
                     extratags=tag, **layout)  # fmt: skip
    found = box(tmp_path / "z.tif", Reading(1, "float32"), (0, 0, 4, 4)).ravel()
    assert np.flatnonzero(np.isnan(found)).tolist() == [7]
    stack = (VALUES[0, 0] >> 8).astype(np.uint8)
    tifffile.imwrite(tmp_path / "y.tif", stack, photometric="miniswhite", **layout)
    found = box(tmp_path / "y.tif", Reading(1, pages="images", page=2))
    assert np.array_equal(found[..., 0], 255 - stack[2, 5:33, 3:41])


def test_each_file_of_an_ome_set_is_an_image(tmp_path):
    for number in range(2):
        tifffile.imwrite(tmp_path / f"{number}.tif", VALUES[0, number, 0], photometric="minisblack")
    planes = "".join(
        f'<TiffData FirstC="{n}" IFD="0"><UUID FileName="{n}.tif">urn:uuid:{n}</UUID></TiffData>' for n in range(2)
    )
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0"><Image ID="Image:0"><Pixels '
        'ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="50" SizeY="40" SizeZ="1" SizeC="2" SizeT="1">'
        f"{planes}</Pixels></Image></OME>"
    )
    for number in range(2):
        tifffile.imwrite(tmp_path / f"{number}.tif", VALUES[0, number, 0], description=xml, metadata=None)
        with (tmp_path / f"{number}.tif").open("rb") as file:
            assert np.array_equal(box(file, Reading(1, "uint16"))[..., 0], VALUES[0, number, 0, 5:33, 3:41])


@pytest.mark.parametrize(
    ("shape", "of_pages", "letters"),
    [
        ((8, 9), False, "YX"),
        ((3, 8, 9), False, "CYX"),
        ((8, 9, 3), False, "YXC"),
        ((8, 3, 9), False, "YCX"),
        ((20, 8, 9), True, "PYX"),
        ((8, 9, 4), True, "YXC"),
        ((20, 8, 9, 3), False, "PYXC"),
        ((20, 3, 8, 9), False, "PCYX"),
    ],
)
def test_axes_by_shape(shape, of_pages, letters):
    assert axes_of(shape, of_pages) == letters


def test_axes_that_are_not_clear_are_asked_for():
    for shape, message in (
        ((10000, 28, 28), r"has 3 axes \[10000, 28, 28\], of which none is the shortest.*--pages images"),
        ((5,), r"has 1 axes \[5\]"),
        ((2, 3, 4, 5, 6), "has 5 axes"),
    ):
        with pytest.raises(OSError, match=message):
            axes_of(shape, False)


def test_wrong_zarr_folders_and_archives_of_arrays(tmp_path):
    group = zarr.open_group(str(tmp_path / "plate.zarr"), mode="w")
    group.create_array("A", data=VALUES[0, 0, 0])
    with pytest.raises(OSError, match="a group of Zarr arrays that is no image of OME: name the image's own folder"):
        open_image(tmp_path / "plate.zarr", Reading(1, "uint16"))
    assert np.array_equal(box(tmp_path / "plate.zarr" / "A", Reading(1, "uint16"))[..., 0], VALUES[0, 0, 0, 5:33, 3:41])
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(OSError, match="no Zarr array that can be read"):
        open_image(tmp_path / "empty.zarr", Reading(1, "uint16"))
    (tmp_path / "empty.zarr" / "zarr.json").write_text(json.dumps({"node_type": "array", "zarr_format": 3}))
    with pytest.raises(OSError, match="no Zarr array that can be read"):
        open_image(tmp_path / "empty.zarr", Reading(1, "uint16"))
    np.savez(tmp_path / "x.npz", train=VALUES[0, 0, 0], test=VALUES[0, 0, 0])
    with pytest.raises(OSError, match=r"holds the arrays train, test: save the one of images as .npy"):
        open_image(tmp_path / "x.npz", Reading(1, "uint16"))
    np.savez(tmp_path / "x.npz", VALUES[0, 0, 0])
    assert np.array_equal(box(tmp_path / "x.npz", Reading(1, "uint16"))[..., 0], VALUES[0, 0, 0, 5:33, 3:41])
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"no array that can be read"):
        open_image(tmp_path / "x.npz", Reading(1, "uint16"))


def test_a_scene_has_the_same_pixels_in_every_format(tmp_path):
    drawn = np.random.default_rng(1).normal(0.2, 0.1, (101, 100, 13)).astype(np.float32)
    for scene in [drawn, *(np.load(path) for path in sorted(SCENES.glob("*.npy")))]:
        np.save(tmp_path / "x.npy", scene)
        planar = np.moveaxis(scene, -1, 0)
        tifffile.imwrite(tmp_path / "x.tif", planar, planarconfig="separate", tile=(32, 32), photometric="minisblack")
        zarr.create_array(str(tmp_path / "x.zarr"), data=planar, chunks=(5, 30, 40), overwrite=True)
        view = NativeView((48, 64), Reading(13, scene.dtype.name), (0.5, 1.5), rotate=True)
        for seed in range(20):
            npy, tif, folder = (view(tmp_path / f"x.{n}", np.random.default_rng(seed)) for n in ("npy", "tif", "zarr"))
            assert torch.equal(npy, tif)
            assert torch.equal(npy, folder)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    "layout",
    [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}, {"interleave": "pixel"}],
    ids=["strips", "tiles", "interleaved"],
)
@pytest.mark.parametrize("nodata", [None, 7])
def test_masks_within_a_geotiff(tmp_path, layout, nodata):
    values = np.random.default_rng(0).integers(1, 4000, (3, 70, 90)).astype(np.uint16)
    values[:, 20:25] = 7
    mask = np.zeros((70, 90), bool)
    mask[10:60, 20:80] = True
    mask[30, 40] = False
    size = {"height": 70, "width": 90, "count": 3, "dtype": "uint16"}
    inside = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with inside, rasterio.open(tmp_path / "x.tif", "w", driver="GTiff", **size, **layout) as file:
        file.write(values)
        file.write_mask(mask)
    with rasterio.open(tmp_path / "x.tif") as file:
        expected = np.where(file.read_masks() > 0, file.read().astype(np.float32), np.nan)
    if nodata is not None:
        expected[expected == nodata] = np.nan
    expected = np.moveaxis(expected, 0, -1)
    assert open_image(tmp_path / "x.tif", Reading(3, "float32")).dtype == "float32"
    for place in ((0, 0, 90, 70), (15, 5, 43, 35)):
        left, top, right, bottom = place
        with (tmp_path / "x.tif").open("rb") as file:
            found = box(file, Reading(3, "float32", nodata=nodata), place)
        assert np.array_equal(found, expected[top:bottom, left:right], equal_nan=True)


@pytest.mark.parametrize(("dtype", "missing"), [(np.uint16, 65535), (np.int16, -9999), (np.float32, 1e20)])
def test_the_greatest_value_is_of_those_that_are_there(tmp_path, dtype, missing):
    rng = np.random.default_rng(0)
    stack = rng.integers(0, 1000, (4, 40, 50)).astype(dtype)
    absent = rng.random(stack.shape) < 0.6
    stack[absent] = missing
    exact = np.where(absent, -np.inf, stack.astype(np.float64)).max(0)
    exact[absent.all(0)] = np.nan
    assert 0.05 < np.isnan(exact).mean() < 0.2
    if dtype is np.float32:
        stack[0][absent[0]] = np.inf
        stack[1][absent[1]] = np.nan
    np.save(tmp_path / "x.npy", stack)
    found = box(tmp_path / "x.npy", Reading(1, "float32", pages="max", nodata=missing), (0, 0, 50, 40))
    assert np.array_equal(found[..., 0], exact.astype(np.float32), equal_nan=True)
    tags = [(42113, "s", 0, str(missing), False)]
    tifffile.imwrite(tmp_path / "x.tif", stack, photometric="minisblack", extratags=tags)
    found = box(tmp_path / "x.tif", Reading(1, "float32", pages="max"), (0, 0, 50, 40))
    assert np.array_equal(found[..., 0], exact.astype(np.float32), equal_nan=True)


def test_what_is_beyond_float32_is_not_the_greatest(tmp_path):
    stack = np.array([1e300, 2.0, -np.inf, 5.0]).reshape(4, 1, 1) * np.ones((4, 8, 9))
    np.save(tmp_path / "x.npy", stack)
    assert (box(tmp_path / "x.npy", Reading(1, "float32", pages="max"), (0, 0, 9, 8)) == 5).all()


def test_the_no_data_value_of_a_white_is_least_tiff_is_the_stored_one(tmp_path):
    values = np.array([[0, 1000], [65535, 7]], np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="miniswhite")
    found = box(tmp_path / "x.tif", Reading(1, "float32", nodata=0), (0, 0, 2, 2))[..., 0]
    assert np.array_equal(found, np.array([[np.nan, 64535], [0, 65528]], np.float32), equal_nan=True)
