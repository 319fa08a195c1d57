"""What the images of a source are: dtype, channels and statistics, found out on a sample before a model is made."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sparse_fcmae.data.config import FormatConfig
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import MissingLibrary, OpenImage, PagesUnsaid, Reading, counted, reading_of
from sparse_fcmae.data.format import FLOATS, ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line
from sparse_fcmae.runtime.options import as_flags
from sparse_fcmae.runtime.streams import Stream, numpy_generator

LOOKED_AT, MEASURED = 64, 256  # images that are opened, and those that are decoded for statistics
CERTAIN = 3  # standard deviations by which a sample has more unreadable images than are allowed
TRIED = 8  # images that are decoded to see whether they suit weights
BOX_SIDE, VALUES = 1024, 1 << 16  # pixels a side of the box that is measured of an image, and of these at most
MOST_VALUES = 1 << 25  # of the whole sample
TAILS = (0.0005, 0.9995)  # quantiles beyond which a value counts as these
SATURATED = 0.01  # fraction of values at the greatest one from which on that is said


class Kind(NamedTuple):
    """What an image is. channels: a photograph's are 3, be it grey or not, as it can be read as either."""

    dtype: str
    channels: int
    photograph: bool

    def __str__(self) -> str:
        if self.photograph:
            return "photographs of 8 bits"
        return f"of {counted(self.channels)} of {self.dtype}"


GREY_PHOTOGRAPH, GREY_ARRAY = Kind("uint8", 3, True), Kind("uint8", 1, False)


def survey(
    source: ImageSource,
    config: FormatConfig,
    seed: int,
    weights: ImageFormat | None = None,
    max_bad_images: float = 1.0,
) -> tuple[ImageFormat, list[str]]:
    """The format of a source's images, and what there is to say about them, a line each.

    Where images differ, most of them decide, and the others are unreadable in training. weights: the images that the
    model's first weights take; where these are the same, so are the statistics. Raises UserError where no image can be
    read or surely more than the fraction `max_bad_images` can't, where a library is missing for them, and for options
    that do not suit the images.
    """
    reading = asked_reading(config)
    if weights and weights.channels and not reading.channels:
        reading = replace(reading, channels=weights.channels)
    kind, grey, notes = _kind(source, reading, max_bad_images)
    form = _without_statistics(kind, grey, reading, config.in_chans, weights)
    if given := [name for name in ("stats", "mean", "std") if config.value_range and getattr(config, name)]:
        raise UserError(f"`value_range` and `{given[0]}` say the same: leave one out")
    if config.value_range:
        reading = reading_of(form, **reading_options(config))
        return _of_range(source, form, config.value_range, reading, seed), notes
    if config.mean or config.std:
        mean, std = (_numbers(config, name, form.in_chans) for name in ("mean", "std"))
        return replace(form, mean=mean, std=std), notes
    if weights and not config.stats and (weights.dtype, weights.in_chans) == (form.dtype, form.in_chans):
        return replace(form, mean=weights.mean, std=weights.std), [*notes, "normalised as the images of these weights"]
    in_colour = kind.photograph and form.in_chans == 3 and not form.channels
    if (config.stats or ("imagenet" if in_colour else "data")) == "imagenet":
        if form.dtype != "uint8":
            raise UserError(
                f"`stats` imagenet is of 8-bit images: these have {form.dtype} values, so give `stats=data`"
            )
        usual = ImageFormat.imagenet(form.in_chans)
        return replace(form, mean=usual.mean, std=usual.std), notes
    measured, remarks = measure(source, form, reading_of(form, **reading_options(config)), seed)
    return measured, notes + remarks


def asked_reading(config: FormatConfig) -> Reading:
    """What the options alone say of the reading. Raises UserError for channels that can't be."""
    channels = tuple(map(int, _parts("channels", config.channels))) if config.channels else None
    if channels and min(channels) < 1:
        raise UserError(f"`channels` {config.channels}: they are counted from 1")
    if channels and len(set(channels)) < len(channels):
        raise UserError(f"`channels` {config.channels}: one is named twice")
    return Reading(channels=channels, **reading_options(config))


def reading_options(config: FormatConfig) -> dict[str, Any]:
    """The fields of a reading that options give and a format does not have."""
    return {"pages": config.pages, "nodata": config.nodata, "max_megapixels": config.max_megapixels}


def sample_values(source: ImageSource, reading: Reading, seed: int) -> np.ndarray:
    """Values [C, N] of up to MEASURED images spread evenly over a source, up to VALUES pixels of a random box of each.

    They are as they are stored. Raises UserError where no image can be read.
    """
    rng, sample, broken = numpy_generator(seed, Stream.SURVEY), [], []
    for index in tqdm(spread(source, MEASURED), desc="measuring", unit="image", leave=False, dynamic_ncols=True):
        found = _look(source, index, lambda file: _values(open_image(file, reading), rng))
        if isinstance(found, Exception):
            broken.append(f"{source.name(index)}: {one_line(found)}")
        else:
            sample.append(found)
    if not sample:
        raise UserError(f"{source}: no image of the sample could be measured: {broken[0]}")
    return np.concatenate(sample).T


def measure(source: ImageSource, form: ImageFormat, reading: Reading, seed: int) -> tuple[ImageFormat, list[str]]:
    """A format with the mean and deviation of each channel of a sample, and what is to be said about the values.

    Values beyond the quantiles TAILS of their channel count as these. Raises UserError where all are the same.
    """
    columns = sample_values(source, reading, seed)
    known = [column[np.isfinite(column)] for column in columns]
    if empty := [str(number) for number, column in enumerate(known, 1) if not len(column)]:
        raise UserError(f"{source}: channel {', '.join(empty)} has no value in the images measured")
    mean, std = zip(*map(_robust, known), strict=True)
    if not any(std):
        raise UserError(f"{source}: all values of the images measured are {mean[0]:g}: nothing to learn")
    missing = 1 - sum(map(len, known)) / columns.size
    return replace(form, mean=mean, std=tuple(value or 1.0 for value in std)), _remarks(form, known, mean, std, missing)


def _robust(column: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of values, the most extreme ones as TAILS says, unless all others are the same."""
    values = column.astype(np.float64)
    clipped = np.clip(values, *np.quantile(values, TAILS))
    values = clipped if clipped.std() else values
    return float(f"{values.mean():.10g}"), float(f"{values.std():.10g}")


def _kind(source: ImageSource, reading: Reading, max_bad_images: float) -> tuple[Kind, bool, list[str]]:
    """What most images looked at are, whether all these are grey photographs, and a line on each that is not like them.

    Raises UserError where most can't be opened for want of a library, or none at all, and where training would surely
    end for more than the fraction `max_bad_images` that it can't read.
    """
    kinds: Counter[Kind] = Counter()
    examples: dict[Kind, str] = {}
    problems: Counter[str] = Counter()
    broken, grey, indices = [], True, spread(source, LOOKED_AT)
    stacks, lacking, hint = list[str](), list[str](), None  # lacking: some of the channels that are to be read
    for index in indices:
        image = _look(source, index, lambda file: open_image(file, reading))
        if isinstance(image, MissingLibrary):
            problems[str(image).replace("needs", "need")] += 1
        elif isinstance(image, PagesUnsaid):
            stacks.append(f"{source.name(index)} {one_line(image)}")
        elif isinstance(image, Exception):
            broken.append(f"{source.name(index)}: {one_line(image)}")
        else:
            as_colour = image.is_photograph or (image.dtype, image.in_chans) == ("uint8", 3)
            channels = 3 if as_colour else image.in_chans
            if reading.channels and max(reading.channels) <= channels:
                channels, as_colour = len(reading.channels), False
            elif reading.channels:
                lacking.append(f"{source.name(index)} with {channels}")
                continue
            kind = Kind(image.dtype, channels, as_colour)
            kinds[kind] += 1
            hint = hint or image.hint
            examples.setdefault(kind, source.name(index))
            grey &= image.in_chans == 1
    lines = [f"{count} of the {len(indices)} images looked at {problem}" for problem, count in problems.items()]
    if problems.total() > kinds.total():
        raise UserError(f"{source}: {lines[0]}")
    if not kinds and lacking:
        asked = ", ".join(map(str, reading.channels))
        raise UserError(f"`channels` {asked}: the images have fewer, such as {lacking[0]}")
    if not kinds:
        raise UserError(f"{source}: none of the {len(indices)} images looked at can be read: {(stacks or broken)[0]}")
    if grey and kinds[GREY_PHOTOGRAPH] and kinds[GREY_ARRAY]:  # which are read in the same way
        kinds[GREY_PHOTOGRAPH] += kinds.pop(GREY_ARRAY)
    (chosen, _), *others = kinds.most_common()
    for kind, count in others:
        lines.append(f"{count} of the {len(indices)} images looked at are {kind}, such as {examples[kind]}")
    if lacking:
        lines.append(f"{len(lacking)} of the {len(indices)} images looked at have fewer channels, such as {lacking[0]}")
    if stacks:
        lines.append(f"{len(stacks)} of the {len(indices)} images looked at have several pages: {stacks[0]}")
    bad, expected = len(indices) - kinds[chosen], max_bad_images * len(indices)
    chance = 0 if len(indices) == len(source) else CERTAIN * expected**0.5
    if bad > expected + chance and bad > len(broken):  # broken files are named when training meets them
        raise UserError(
            f"{source}: {'; '.join(lines)}: the others are {chosen}, so choose these by a pattern or a list, or raise "
            "`max_bad_images`"
        )
    lines = [f"{line}: they count as unreadable, as the others are {chosen}" for line in lines]
    return chosen, grey, [*lines, *([as_flags(hint, ["pages"])] if hint else [])]


def _without_statistics(
    kind: Kind, grey: bool, reading: Reading, in_chans: int | None, weights: ImageFormat | None
) -> ImageFormat:
    """The format of images of a kind, with a mean and a deviation that stand for those still to be found."""
    found = len(reading.channels) if reading.channels else 1 if kind.photograph and grey else kind.channels
    choices = {1, 3} if kind.photograph and not reading.channels else {found}
    if in_chans is not None and in_chans not in choices:
        what = f"the options select {found}" if reading.channels else f"the images have {found}"
        raise UserError(f"`in_chans` {in_chans}: {what}, so leave it out")
    if in_chans is None and weights and weights.in_chans in choices:
        in_chans = weights.in_chans
    channels = in_chans or found
    kept = {"channels": reading.channels, "pages": reading.pages, "nodata": reading.nodata}
    return ImageFormat(kind.dtype, (0.0,) * channels, (1.0,) * channels, **kept)


def _look(source: ImageSource, index: int, look: Callable) -> Any:
    """What is found out about an image, or the exception that it could not be read by. Training names such an image."""
    try:
        with source.open(index) as file:
            return look(file)
    except Exception as error:  # decoders raise nearly anything on a broken file
        return error


def check_fits(source: ImageSource, view: Callable[[Any], Any]) -> None:
    """Raises UserError where none of a few images, spread evenly over a source, can be seen by a view."""
    found = [(index, _look(source, index, view)) for index in spread(source, TRIED)]
    if all(isinstance(result, Exception) for _, result in found):
        index, error = found[0]
        raise UserError(
            f"{source}: none of the {len(found)} images tried is what the weights take: {source.name(index)}: "
            f"{one_line(error)}"
        )


def spread(source: ImageSource, count: int) -> list[int]:
    """Up to so many images, spread evenly."""
    return np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()


def _values(image: OpenImage, rng: np.random.Generator) -> np.ndarray:
    """[values, C] of a random box of an image, as they are stored."""
    width, height = image.size
    w, h = min(width, BOX_SIDE), min(height, BOX_SIDE)
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    rows = image.resized_crop((left, top, left + w, top + h), (h, w)).flatten(0, 1).numpy()
    return rows[rng.permutation(len(rows))[: min(VALUES, max(1, MOST_VALUES // (MEASURED * rows.shape[1])))]]


def _of_range(source: ImageSource, form: ImageFormat, text: str, reading: Reading, seed: int) -> ImageFormat:
    """A format with the mean and deviation of values that are spread evenly over a range.

    text: its ends, the same for all channels, or percentiles of each channel's values in a sample. Raises UserError for
    what is no range, and for a channel whose percentiles are the same.
    """
    percent = "%" in text
    ends = _parts("value_range", text.replace("%", ""))
    if len(ends) != 2 or text.count("%") not in (0, 2) or not np.isfinite(ends).all() or ends[0] >= ends[1]:
        raise UserError(
            f"`value_range` {text}: give two numbers or percentiles, the smaller first, as 0,4095 or 1%,99%"
        )
    if percent and not (ends[0] >= 0 and ends[1] <= 100):
        raise UserError(f"`value_range` {text}: percentiles are from 0 to 100")
    if not percent:
        low, high = (np.full(form.in_chans, end) for end in ends)
    else:
        columns = sample_values(source, reading, seed).astype(np.float64)
        low, high = np.nanquantile(np.where(np.isfinite(columns), columns, np.nan), np.array(ends) / 100, axis=1)
    if same := [str(channel) for channel in np.flatnonzero(~(low < high)) + 1]:
        raise UserError(f"`value_range` {text}: channel {', '.join(same)} has no values between these")
    mean, std = (low + high) / 2, (high - low) / 12**0.5
    return replace(form, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def _parts(name: str, text: str) -> list[float]:
    """The numbers of an option, repetitions kept. Raises UserError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"`{name}` {text}: give numbers with commas between them") from None


def _numbers(config: FormatConfig, name: str, channels: int) -> tuple[float, ...]:
    """The numbers of `mean` or `std`. Raises UserError unless there is one a channel, and for deviations of 0."""
    text = getattr(config, name)
    if not text:
        raise UserError(f"`{name}` is missing: `mean` and `std` go together")
    values = tuple(_parts(name, text))
    if len(values) != channels or not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
        what = "a positive number" if name == "std" else "a number"
        raise UserError(f"`{name}` {text}: give {what} for each of the {channels} channels, with commas between them")
    return values


def _remarks(
    form: ImageFormat, known: list[np.ndarray], mean: tuple[float, ...], std: tuple[float, ...], missing: float
) -> list[str]:
    """The range and the statistics of each channel, and what may be wrong with its values, a line each."""
    lines = [f"the images are {Kind(form.dtype, form.in_chans, False)}, normalised with their own statistics"]
    numbers = form.channels or range(1, 1 + form.in_chans)
    for number, column, m, s in zip(numbers, known, mean, std, strict=True):
        low, high = column.min(), column.max()
        line = f"channel {number}: values from {low:.6g} to {high:.6g}, mean {m:.6g}, deviation {s:.6g}"
        if not s:
            line += "; it is constant, so it holds nothing to learn"
        elif (share := float((column == high).mean())) > SATURATED:
            line += f"; {share:.0%} of them are the greatest: is it saturated?"
        lines.append(line)
    if form.dtype in FLOATS and missing:
        lines.append(f"{missing:.2%} of the values are missing: they count neither in the statistics nor in the loss")
    return lines
