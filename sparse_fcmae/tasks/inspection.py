"""The command `inspect`: what images hold, and what training would see of them, before a day is spent on it."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from sparse_fcmae.data.batches import TrainingImages
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading, counted, reading_of
from sparse_fcmae.data.decoders.ome_zarr import ZarrFolder
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.opening import is_named, open_images
from sparse_fcmae.data.sources.pages import by_page
from sparse_fcmae.data.sources.windows import Windows
from sparse_fcmae.data.survey import Kind, asked_reading, reading_options, sample_values, spread, survey
from sparse_fcmae.evaluation.pictures import draw_histograms, rgb, shown
from sparse_fcmae.evaluation.sheet import save_picture, sheet
from sparse_fcmae.kernels.constants import SIDES
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, write_json, writing
from sparse_fcmae.runtime.options import check, image_size_of, keywords_of
from sparse_fcmae.tasks.build import training_view
from sparse_fcmae.tasks.config import STRIDES, InspectConfig

REPORT, HISTOGRAMS, VIEWS = "inspection.json", "histograms.png", "views.png"  # files in the folder `out`
PIECE = 1 << 20  # bytes that are read at once
EXAMPLES = 5  # that a line of the report names
SMALLER, LARGER = 0.75, 4  # times the side that the model sees, from which on images call for advice
LEAST_PATCHES = 4  # along a side, for a mask to leave something to learn from
ROWS, VIEWS_EACH = 6, 4  # images in the sheet of views, and views of each


@keywords_of(InspectConfig)
def inspect(options: dict[str, Any]) -> dict[str, Any]:
    """Looks at images and prints what they are: kinds, sizes, unreadable files, copies, channels and statistics.

    Returns what it prints. With `out` this is written there too, with pictures of the values and of what training
    would see. Raises UserError for what the user can put right, after the report of what was found until then.
    """
    config = InspectConfig(**options)
    check(config)
    if config.data is None or (is_named(config.data) and not config.data):
        raise UserError("`data` is missing: name the folder with the images")
    out = Path(config.out) if config.out else None
    if out and (out / REPORT).exists() and not config.overwrite:
        raise UserError(f"`out` {out} holds an inspection: choose another or give `overwrite=True`")
    source, size = open_images(config.data, config.out, config), image_size_of(config.image_size)
    reading = asked_reading(config)
    found = look_at(source, reading, config.images)
    print("\n".join([*report(source, found), *source.notes]), flush=True)
    files, source = source, by_page(source, reading)
    for note in source.notes[len(files.notes) :]:
        print(note)
    form, notes = survey(source, config, config.seed)
    if config.crop != "native":
        notes += advice(found["sizes"], size)
    found |= {"format": form.as_json(), "notes": [*source.notes, *notes]}
    print("\n".join([*notes, f"training reads {counted(form.in_chans)} of {form.dtype}"]))
    if config.crop == "native":
        view = training_view(config, size, form)
        windows = Windows(source, view, 1.0)
        print("\n".join(windows.notes[len(source.notes) :]))
    if out:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        drawn = draw(source, form, config, size, out)
        write_json(out / REPORT, found)
        print(f"pictures in {out}: {', '.join(drawn)}")
    return found


def look_at(source: ImageSource, reading: Reading, count: int) -> dict[str, Any]:
    """What up to `count` images are, spread evenly over a source.

    How many there are of each kind, their sizes, which can't be decoded and why, and which have the same bytes.
    """
    kinds, sizes, unreadable = Counter[str](), [], {}
    copies: dict[bytes, list[str]] = defaultdict(list)
    for index in tqdm(indices := spread(source, count), desc="looking", unit="image", dynamic_ncols=True, leave=False):
        name = source.name(index)
        try:
            with source.open(index) as file:
                copies[digest(file)].append(name)
                image = open_image(file, replace(reading, page=0))
                image.decode_all()
        except Exception as error:  # decoders raise nearly anything on a broken file
            unreadable[name] = one_line(error)
        else:
            kinds[str(Kind(image.dtype, image.in_chans, image.is_photograph))] += 1
            sizes.append(image.size[::-1])
    sizes.sort(key=lambda size: size[0] * size[1])
    places = {"least": 0, "median": len(sizes) // 2, "greatest": -1}
    return {
        "data": str(source),
        "images": len(source),
        "looked_at": len(indices),
        "kinds": dict(kinds.most_common()),
        "sizes": {name: sizes[place] for name, place in places.items()} if sizes else {},
        "unreadable": unreadable,
        "copies": [names for names in copies.values() if len(names) > 1],
    }


def digest(file: BinaryIO | ZarrFolder) -> bytes:
    """A digest of an image's bytes, read in pieces."""
    found = hashlib.sha256()
    if isinstance(file, ZarrFolder):
        for path in sorted(path for path in file.path.rglob("*") if path.is_file()):
            found.update(path.relative_to(file.path).as_posix().encode() + path.read_bytes())
        return found.digest()
    while piece := file.read(PIECE):
        found.update(piece)
    file.seek(0)
    return found.digest()


def report(source: ImageSource, found: dict[str, Any]) -> list[str]:
    """What was found, for people, a line for each thing."""
    lines = [f"{found['images']} images of {source}, of which {found['looked_at']} were looked at"]
    lines += [f"{kind}: {count}" for kind, count in found["kinds"].items()]
    if found["sizes"]:
        words = (f"{name} {height}x{width}" for name, (height, width) in found["sizes"].items())
        lines.append(f"pixels by area: {', '.join(words)}")
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in found["unreadable"].items():
        reasons[reason].append(name)
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(names)} can't be read ({reason}): {_some(names)}")
    if reasons:
        bad = f"{len(found['unreadable'])} of {found['looked_at']}"
        lines.append(f"{bad} can't be read: training ends where that is more than --max-bad-images, 1 % by default")
    if found["copies"]:
        extra = sum(len(names) - 1 for names in found["copies"])
        have = "has" if extra == 1 else "have"
        lines.append(f"{extra} {have} the same bytes as another: {_some([' = '.join(c) for c in found['copies']])}")
    return lines


def advice(sizes: dict[str, tuple[int, int]], size: tuple[int, int]) -> list[str]:
    """What to do about images that are far smaller or far larger than what the model sees, by the median image."""
    if not sizes:
        return []
    side, seen = min(sizes["median"]), min(size)
    if 8 <= side < SMALLER * seen:
        stride = next(stride for stride in STRIDES if stride == 1 or side >= LEAST_PATCHES * SIDES[0] * stride)
        patch = SIDES[0] * stride
        fitting = (side + patch // 2) // patch * patch
        return [f"half of the images are enlarged to be seen: --image-size {fitting} --stem-stride {stride} suits them"]
    if side > LARGER * seen:
        return [f"half of the images are made at least {side // seen} times smaller: --crop native keeps their details"]
    return []


def draw(source: ImageSource, form: ImageFormat, config: InspectConfig, size: tuple[int, int], out: Path) -> list[str]:
    """Histograms of the values of each channel, and random views of a few images. Returns what was drawn."""
    values = sample_values(source, reading_of(form, **reading_options(config)), config.seed)
    drawn = [f"{VIEWS} of what training sees"]
    try:
        draw_histograms(values, form, out / HISTOGRAMS)
        drawn.insert(0, f"{HISTOGRAMS} of the values")
    except ImportError:
        print(f"{HISTOGRAMS} is not drawn, as matplotlib is not installed (extra: plots)")
    crops = TrainingImages(source, training_view(config, size, form), config.seed)
    drawn_of = {i: [crops[epoch, i].pixels for epoch in range(VIEWS_EACH)] for i in spread(source, ROWS)}
    drawn_of = {i: row for i, row in drawn_of.items() if all(pixels is not None for pixels in row)}
    samples, names = list(drawn_of.values()), list(map(source.name, drawn_of))
    if not samples:
        raise UserError(f"{source}: no image can be shown as training would see it")
    images = form.normalise(torch.stack([pixels for row in samples for pixels in row]))
    tiles = rgb(shown(form, images, images)).reshape(len(samples), VIEWS_EACH, *size, 3)
    columns = {f"view {number + 1}": np.ascontiguousarray(tiles[:, number]) for number in range(VIEWS_EACH)}
    save_picture(sheet(columns, names), out / VIEWS)
    return drawn


def _some(names: list[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", ..." if len(names) > EXAMPLES else "")
