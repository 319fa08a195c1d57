"""The options of how images are read, and of the views of them that are trained on."""

from dataclasses import dataclass

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.options import listed, option

CACHE_GB = 20.0
MAX_MEGAPIXELS = 1000.0  # takes 3 GB of memory in colour
NATIVE_SCALE = 1.0, 1.0
RATIOS = 3 / 4, 4 / 3  # of a random crop's width to its height, as in the paper's recipe


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Options of where images come from."""

    path_column: str | None = option(None, help="of a table: the column of the images' paths [path, file, image, ...]")
    label_column: str | None = option(None, help="the column of their classes [label, class, target, ...]")
    split_column: str | None = option(None, help="the column that says train, val or test [split, set, ...]")
    channel_files: tuple[str, ...] | None = option(
        None, help="the channels' files of an image below `data`, as '{name}_w1.tif' '{name}_w2.tif'"
    )
    cache_gb: float = option(
        CACHE_GB,
        help="of images behind addresses so much is kept on the disk, in 10^9 bytes",
        at_least=0,
        resumable=True,
    )


@dataclass(frozen=True, kw_only=True)
class MaskConfig(SourceConfig):
    """Options of where the masks of images are, and which classes these have."""

    masks: str | None = option(
        None,
        help="for segmentation: folder of masks that have the images' paths [in `data`, as images/ and masks/]",
        path=True,
        resumable=True,
    )
    mask_column: str | None = option(None, help="of a table: the column of the masks' paths [mask, annotation, ...]")
    mask_name: str | None = option(
        None, help="what images' names have, and masks' in its place, as leftImg8bit=gtFine_labelTrainIds"
    )
    ignore: str | None = option(
        None, help="values of pixels in masks that do not count, as 0,255, or none where all are classes [255]"
    )
    class_names: str | None = option(
        None, help="names of masks' classes in ascending order of their values, as sky,road, or a file with one a line"
    )


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(SourceConfig):
    """Options of how images are read."""

    max_megapixels: float = option(
        MAX_MEGAPIXELS,
        help="a larger image counts as unreadable, as each process that loads images needs memory for a whole one",
        above=0,
        resumable=True,
    )
    pages: str | None = option(
        None,
        help="what the pages of a file are: channels, images of their own, or max for the greatest value of each pixel",
        choices=("channels", "images", "max"),
    )
    nodata: float | None = option(None, help="the value of pixels without data, whatever files say [what a TIFF says]")


@dataclass(frozen=True, kw_only=True)
class FormatConfig(ReadingConfig):
    """Options of what images are read as, where weights do not fix it."""

    in_chans: int | None = option(
        None, help="channels [those of the images; of photographs 3, or 1 where all are grey]", above=0
    )
    channels: str | None = option(None, help="which channels of the files to read, counted from 1, as 4,3,2 [all]")
    stats: str | None = option(
        None,
        help="what images are normalised with: their own mean and deviation, or ImageNet's [imagenet for 8-bit colour]",
        choices=("data", "imagenet"),
    )
    mean: str | None = option(None, help="or these means, one a channel, in the values' own units, as 1510,380")
    std: str | None = option(None, help="and these deviations")
    value_range: str | None = option(
        None, help="or as if values were spread evenly over a range, as 0,4095, or between percentiles, as 1%,99%"
    )


@dataclass(frozen=True, kw_only=True)
class ViewConfig(FormatConfig):
    """Options of the random crops that are trained on."""

    min_crop: float = option(0.2, help="least fraction of the area in a random crop", above=0, at_most=1)
    crop_ratio: str | None = option(
        None, help="least and greatest width of a random crop by its height, as 0.5,2 [3/4 and 4/3]"
    )
    crop: str | None = option(
        None,
        help="resized: a random part of the image, whatever its size; native: a window at the image's own resolution "
        "[resized, or as `init` was trained]",
        choices=("resized", "native"),
    )
    scale: str | None = option(
        None, help="least and greatest side of a native window, by that of the model's image, as 0.5,2 [1,1]"
    )
    min_valid: float = option(
        0.0, help="redraw native windows with a smaller fraction of values", at_least=0, at_most=1
    )
    min_std: float = option(
        0.0, help="redraw native windows with a smaller deviation, by that of the data set, as 0.1", at_least=0
    )
    hflip: bool = option(True, help="flip half of the crops horizontally")
    rotate: bool = option(
        False, help="turn crops by random quarter turns and flip them both ways, for images without an upright position"
    )


MASK_OPTIONS = ("masks", "mask_column", "mask_name", "ignore", "class_names")


def range_of(name: str, text: str | None, default: tuple[float, float]) -> tuple[float, float]:
    """The least and the greatest number that an option means. Raises UserError where it is not two positive ones."""
    if text is None:
        return default
    low, *rest = listed(name, text, float)
    high = rest[0] if rest else low
    if len(rest) > 1 or not 0 < low <= high < float("inf"):
        raise UserError(f"`{name}` {text}: give two positive numbers, the smaller first, as 0.5,2")
    return low, high
