import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.config import FormatConfig
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.survey import survey


def survey_of(folder, weights=None, **options):
    return survey(ImageFolder(folder), FormatConfig(**options), 0, weights)


def arrays(folder, values):
    folder.mkdir(exist_ok=True)
    for number, array in enumerate(values):
        np.save(folder / f"{number:03}.npy", array)
    return folder


def test_photographs_are_normalised_as_imagenet(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    assert survey_of(tmp_path) == (ImageFormat.imagenet(), [])
    assert survey_of(tmp_path, in_chans=1, stats="imagenet")[0] == ImageFormat.imagenet(1)
    assert survey_of(tmp_path, weights=ImageFormat.imagenet(1))[0] == ImageFormat.imagenet(1)
    form, _ = survey_of(tmp_path, mean="1,2,3", std="4,5,6")
    assert form == ImageFormat("uint8", (1, 2, 3), (4, 5, 6))


def test_grey_photographs_have_one_channel_and_their_own_statistics(tmp_path):
    pixels = np.random.default_rng(0).integers(20, 90, (6, 32, 32)).astype(np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    form, notes = survey_of(tmp_path)
    assert (form.dtype, form.in_chans) == ("uint8", 1)
    assert form.mean[0] == pytest.approx(pixels.mean(), abs=0.05)
    assert form.std[0] == pytest.approx(pixels.std(), abs=0.05)
    assert "channel 1: values from 20 to 89" in notes[1]
    assert survey_of(tmp_path, in_chans=3)[0] == ImageFormat.imagenet()


def test_statistics_of_each_channel_are_robust(tmp_path):
    rng = np.random.default_rng(1)
    images = rng.normal([1500, 0.01], [300, 0.002], (20, 64, 64, 2)).astype(np.float32)
    spoilt = images.copy()
    spoilt[3, 5, 5, 0], spoilt[4, 1, 1, 1], spoilt[5, :, 60:] = np.inf, np.nan, -9999
    spoilt[7, 7, 7, 0] = 1e30
    form, notes = survey_of(arrays(tmp_path / "x", spoilt), nodata=-9999)
    assert form.dtype == "float32"
    assert form.mean == pytest.approx((1500, 0.01), rel=0.01)
    assert form.std == pytest.approx((300, 0.002), rel=0.02)
    assert any("% of the values are missing" in note for note in notes)
    assert survey_of(tmp_path / "x", nodata=-9999) == (form, notes)  # the same again


def test_files_of_different_deviation_stay_apart(tmp_path):
    rng = np.random.default_rng(2)
    images = [rng.normal(0, deviation, (64, 64)).astype(np.float32) for deviation in (0.01, 0.1)]
    form, _ = survey_of(arrays(tmp_path / "x", images))
    together = np.concatenate([image.ravel() for image in images])
    assert form.std[0] == pytest.approx(together.std(), rel=0.02)


def test_channels_are_selected(tmp_path):
    images = np.random.default_rng(3).normal(np.arange(13) * 10, 1, (8, 32, 32, 13)).astype(np.float32)
    folder = arrays(tmp_path / "x", images)
    assert survey_of(folder)[0].in_chans == 13
    form, _ = survey_of(folder, channels="4,3,2")
    assert form.channels == (4, 3, 2)
    assert form.mean == pytest.approx((30, 20, 10), abs=0.1)
    with pytest.raises(UserError, match="`in_chans` 5: the images have 13, so leave it out"):
        survey_of(folder, in_chans=5)
    with pytest.raises(UserError, match="`in_chans` 5: the options select 3, so leave it out"):
        survey_of(folder, channels="4,3,2", in_chans=5)
    with pytest.raises(UserError, match="`channels` 0,1: they are counted from 1"):
        survey_of(folder, channels="0,1")
    with pytest.raises(UserError, match=r"`channels` 14: the images have fewer, such as .* with 13"):
        survey_of(folder, channels="14")


def test_most_images_decide_and_the_others_are_said(tmp_path):
    folder = arrays(tmp_path / "x", np.random.default_rng(4).integers(0, 4096, (5, 16, 16)).astype(np.uint16))
    Image.new("RGB", (8, 8)).save(folder / "photo.png")
    (folder / "broken.npy").write_text("x")
    form, notes = survey_of(folder)
    assert (form.dtype, form.in_chans) == ("uint16", 1)
    assert notes[0] == (
        "1 of the 7 images looked at are photographs of 8 bits, such as photo.png: they count as unreadable, as the "
        "others are of 1 channel of uint16"
    )


def test_a_mixture_that_training_would_end_for_is_refused_first(tmp_path):
    folder = arrays(tmp_path / "x", np.random.default_rng(4).integers(0, 4096, (9, 16, 16)).astype(np.uint16))
    for number in range(8):
        Image.new("RGB", (8, 8)).save(folder / f"photo{number}.png")
    source, config = ImageFolder(folder), FormatConfig()
    with pytest.raises(UserError, match=r"8 of the 17 images looked at are photographs of 8 bits, such as photo0"):
        survey(source, config, 0, max_bad_images=0.1)
    assert survey(source, config, 0, max_bad_images=0.5)[0].dtype == "uint16"
    for number in range(200):  # 8 of 217 at most: a sample that says more may be chance
        np.save(folder / f"more{number}.npy", np.load(folder / "000.npy"))
    assert survey(ImageFolder(folder), config, 0, max_bad_images=0.03)[0].dtype == "uint16"


def test_images_that_are_read_alike_are_of_one_kind(tmp_path):
    for number, channels in enumerate((4, 8, 4, 8)):
        np.save(tmp_path / f"{number}.npy", np.full((16, 17, channels), number, np.uint16))
    form, notes = survey(ImageFolder(tmp_path), FormatConfig(channels="1,3"), 0, max_bad_images=0)
    assert (form.in_chans, [note for note in notes if "unreadable" in note]) == (2, [])
    with pytest.raises(UserError, match="`channels` 9: the images have"):
        survey_of(tmp_path, channels="9")
    (tmp_path / "grey").mkdir()
    Image.new("L", (16, 16), 3).save(tmp_path / "grey" / "a.png")
    np.save(tmp_path / "grey" / "b.npy", np.full((16, 16), 9, np.uint8))
    form, notes = survey(ImageFolder(tmp_path / "grey"), FormatConfig(), 0, max_bad_images=0)
    assert (form.in_chans, [note for note in notes if "unreadable" in note]) == (1, [])


def test_an_array_that_may_be_a_stack_is_said(tmp_path):
    folder = arrays(tmp_path / "x", np.random.default_rng(0).integers(0, 9, (2, 12, 30, 31)).astype(np.uint16))
    _, notes = survey_of(folder)
    assert "the first of axes [12, 30, 31] counts channels: if it counts images, give --pages images" in notes
    _, notes = survey_of(folder, pages="channels")
    assert not any("axes" in note for note in notes)


def test_ranges_and_percentiles(tmp_path):
    images = np.random.default_rng(4).integers(0, 4096, (5, 64, 64, 2)).astype(np.uint16)
    images[..., 1] //= 4
    folder = arrays(tmp_path / "x", images)
    form, _ = survey_of(folder, value_range="0,4095")
    assert form.mean == (2047.5, 2047.5)
    assert form.std == pytest.approx([4095 / 12**0.5] * 2)
    form, _ = survey_of(folder, value_range="1%,99%")
    low, high = np.quantile(images.reshape(-1, 2), [0.01, 0.99], axis=0)
    assert form.mean == pytest.approx((low + high) / 2, rel=0.01)
    assert form.std == pytest.approx((high - low) / 12**0.5, rel=0.01)
    for text, message in (
        ("4095", "give two numbers or percentiles"),
        ("9,3", "give two numbers or percentiles, the smaller first"),
        ("1%,99", "give two numbers or percentiles"),
        ("1%,101%", "percentiles are from 0 to 100"),
        ("a,b", "give numbers with commas"),
    ):
        with pytest.raises(UserError, match=f"`value_range` {text}: .*{message}"):
            survey_of(folder, value_range=text)
    with pytest.raises(UserError, match="`value_range` and `mean` say the same"):
        survey_of(folder, value_range="0,1", mean="1,1", std="1,1")
    images[..., 1] = 7
    with pytest.raises(UserError, match="channel 2 has no values between these"):
        survey_of(arrays(tmp_path / "y", images), value_range="1%,99%")


def test_what_stands_out_is_said(tmp_path):
    images = np.random.default_rng(5).integers(0, 4096, (5, 32, 32, 3)).astype(np.uint16)
    images[..., 1] = 7
    images[..., 2] = images[..., 2].clip(0, 2000)
    form, notes = survey_of(arrays(tmp_path / "x", images))
    assert form.std[1] == 1
    assert "the images are of 3 channels of uint16, normalised with their own statistics" in notes
    assert any("channel 2: " in note and "it is constant" in note for note in notes)
    assert any("channel 3: " in note and "51% of them are the greatest" in note for note in notes)


def test_mistakes(tmp_path, monkeypatch):
    folder = arrays(tmp_path / "x", np.full((3, 16, 16), 7, np.int16))
    with pytest.raises(UserError, match="all values of the images measured are 7: nothing to learn"):
        survey_of(folder)
    with pytest.raises(UserError, match="`stats` imagenet is of 8-bit images: these have int16 values"):
        survey_of(folder, stats="imagenet")
    for options, message in (
        ({"mean": "1,2", "std": "1"}, "`mean` 1,2: give a number for each of the 1 channels"),
        ({"mean": "1"}, "`std` is missing: `mean` and `std` go together"),
        ({"mean": "1", "std": "0"}, "`std` 0: give a positive number"),
        ({"mean": "1", "std": "nan"}, "`std` nan: give a positive number"),
    ):
        with pytest.raises(UserError, match=message):
            survey_of(folder, **options)
    nothing = arrays(tmp_path / "y", np.full((2, 8, 8), np.nan, np.float32))
    with pytest.raises(UserError, match="channel 1 has no value in the images measured"):
        survey_of(nothing)
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "x.png").write_text("x")
    with pytest.raises(UserError, match=r"none of the 1 images looked at can be read: x.png: no image of a known"):
        survey_of(tmp_path / "z")
    stack = np.zeros((6, 8, 8), np.uint16)
    tifffile.imwrite(tmp_path / "z" / "x.tif", stack, photometric="minisblack")
    (tmp_path / "z" / "x.png").unlink()
    with pytest.raises(UserError, match=r"has 6 pages .*--pages says what they are"):
        survey_of(tmp_path / "z")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match=r"1 of the 1 images looked at need tifffile: pip install tifffile imagecodecs"):
        survey_of(tmp_path / "z")


def test_weights_that_take_the_same_images_keep_their_statistics(tmp_path):
    folder = arrays(tmp_path / "x", np.random.default_rng(6).integers(0, 4096, (5, 16, 16)).astype(np.uint16))
    weights = ImageFormat("uint16", (1000.0,), (300.0,))
    assert survey_of(folder, weights)[0] == weights
    assert survey_of(folder, weights, stats="data")[0] != weights
    assert survey_of(folder, ImageFormat.imagenet())[0].dtype == "uint16"


def test_colour_in_arrays_is_colour(tmp_path):
    images = np.random.default_rng(7).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    assert survey_of(arrays(tmp_path / "x", images))[0] == ImageFormat.imagenet()


def test_numbers_may_repeat(tmp_path):
    folder = arrays(tmp_path / "x", np.random.default_rng(8).integers(0, 4096, (4, 16, 16, 3)).astype(np.uint16))
    form, _ = survey_of(folder, mean="5,5,5", std="2,2,3")
    assert (form.mean, form.std) == ((5, 5, 5), (2, 2, 3))
    with pytest.raises(UserError, match="`channels` 2,1,2: one is named twice"):
        survey_of(folder, channels="2,1,2")


def test_few_bright_values_on_nothing_are_something(tmp_path):
    images = np.zeros((4, 64, 64), np.uint16)
    images[:, 10, 10] = 1000
    assert survey_of(arrays(tmp_path / "x", images))[0].std[0] > 1


def test_what_is_missing_belongs_to_the_format(tmp_path):
    images = np.random.default_rng(9).normal(100, 10, (4, 32, 32)).astype(np.float32)
    images[:, :8] = -9999
    form, _ = survey_of(arrays(tmp_path / "x", images), nodata=-9999.0)
    assert ImageFormat.of_json(form.as_json()).nodata == -9999
    assert form.mean[0] == pytest.approx(100, rel=0.02)


def test_weights_keep_their_selection_of_channels(tmp_path):
    folder = arrays(tmp_path / "x", np.random.default_rng(10).integers(0, 4096, (4, 16, 16, 6)).astype(np.uint16))
    weights = ImageFormat("uint16", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), channels=(4, 3, 2))
    assert survey_of(folder, weights)[0] == weights


def test_files_of_several_pages_count_as_another_kind(tmp_path):
    """More of them than may be unreadable are refused before training, fewer are said."""
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green")]
    for number in range(20):
        frames[0].save(tmp_path / f"{number:02}.jpg")
    for number in (20, 21):
        frames[0].save(tmp_path / f"{number}.gif", save_all=True, append_images=frames[1:])
    text = r"2 of the 22 images looked at have several pages: 20.gif has 2 frames: --pages says what they are"
    with pytest.raises(UserError, match=text):
        survey(ImageFolder(tmp_path), FormatConfig(), 0, max_bad_images=0.05)
    _, notes = survey(ImageFolder(tmp_path), FormatConfig(), 0, max_bad_images=0.5)
    assert "they count as unreadable" in notes[0]


def test_images_with_fewer_channels_than_asked_for_are_said_or_refused(tmp_path):
    for number in range(10):
        np.save(tmp_path / f"{number}.npy", np.ones((8, 8, 5 if number < 3 else 4), np.float32) * number)
    config = FormatConfig(channels="5")
    text = r"7 of the 10 images looked at have fewer channels, such as 3.npy with 4"
    with pytest.raises(UserError, match=f"{text}: the others are of 1 channel of float32"):
        survey(ImageFolder(tmp_path), config, 0, max_bad_images=0.01)
    _, notes = survey(ImageFolder(tmp_path), config, 0)
    assert notes[0].startswith(text)
