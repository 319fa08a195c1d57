"""Sheets of small pictures under their names: how they are laid out, drawn, saved and cut up again."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sparse_fcmae.runtime.files import write_atomic

GAP, LABEL_HEIGHT, LEAST_WIDTH = 4, 14, 96  # pixels of a sheet
ACROSS, CAPTION_WIDTH = 6, 144  # pictures in a row of those with captions, and pixels of each at least
EMPTY: Mapping[str, np.ndarray] = {}
Tile = tuple[int, int, int, int]  # left, top, width, height


def sheet(
    columns: dict[str, np.ndarray], rows: Sequence[str] = (), legend: Mapping[str, np.ndarray] = EMPTY
) -> Image.Image:
    """Columns of pictures [N, H, W, 3] under their names, enlarged to a width of at least LEAST_WIDTH.

    rows: the names of the N rows, which are written above them, where there are any. legend: colours by what they
    mean, float [3] between 0 and 1, which are shown at the bottom.
    """
    count, height, width, _ = next(iter(columns.values())).shape
    scale = max(1, -(-LEAST_WIDTH // width))
    height, width = height * scale, width * scale
    each = height + GAP + (LABEL_HEIGHT if rows else 0)
    size = (len(columns) * (width + GAP) + GAP, count * each + GAP + LABEL_HEIGHT)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for column, (name, tiles) in enumerate(columns.items()):
        left = GAP + column * (width + GAP)
        draw.text((left, 2), name, fill="black")
        for row, tile in enumerate(tiles):
            enlarged = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(enlarged, (left, LABEL_HEIGHT + row * each + each - height))
    for row, name in enumerate(rows):
        draw.text((GAP, LABEL_HEIGHT + row * each + 2), _fitting(draw, name, size[0] - 2 * GAP), fill="black")
    return _with_legend(picture, legend) if legend else picture


def tiles_of(size: tuple[int, int], columns: int, shape: tuple[int, int]) -> list[list[Tile]] | None:
    """Where the tiles of a sheet lie whose rows have no names, by row and column.

    size: width and height of the sheet. shape: height and width of the pictures on it, before they were enlarged. None
    where no such sheet has that size.
    """
    width, rest = divmod(size[0] - GAP, columns)
    scale, uneven = divmod(width - GAP, shape[1])
    height = shape[0] * scale
    rows, over = divmod(size[1] - LABEL_HEIGHT - GAP, height + GAP) if scale > 0 else (0, 0)
    if rest or uneven or over or rows < 1:
        return None
    lefts = [GAP + column * width for column in range(columns)]
    tops = [LABEL_HEIGHT + row * (height + GAP) + GAP for row in range(rows)]
    return [[(left, top, width - GAP, height) for left in lefts] for top in tops]


def captioned(tiles: np.ndarray, captions: Sequence[Sequence[str]]) -> Image.Image:
    """Pictures [N, H, W, 3] in rows of ACROSS, each enlarged to a width of at least CAPTION_WIDTH, below its lines."""
    count, height, width, _ = tiles.shape
    scale, lines = max(1, -(-CAPTION_WIDTH // width)), max(map(len, captions))
    height, width = height * scale, width * scale
    across, each = min(ACROSS, count), height + lines * LABEL_HEIGHT + 2 * GAP
    picture = Image.new("RGB", (across * (width + GAP) + GAP, -(-count // across) * each), "white")
    draw = ImageDraw.Draw(picture)
    for number, (tile, texts) in enumerate(zip(tiles, captions, strict=True)):
        left, top = GAP + number % across * (width + GAP), number // across * each + GAP
        for line, text in enumerate(texts):
            draw.text((left, top + line * LABEL_HEIGHT), _fitting(draw, text, width), fill="black")
        enlarged = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(enlarged, (left, top + lines * LABEL_HEIGHT))
    return picture


def _with_legend(picture: Image.Image, legend: Mapping[str, np.ndarray]) -> Image.Image:
    """A picture with squares of colours and their names below it, in as many lines as they need."""
    measure, places, left, line = ImageDraw.Draw(picture), [], GAP, 0
    for name in legend:
        text = _fitting(measure, name, picture.width - LABEL_HEIGHT - 2 * GAP)
        width = LABEL_HEIGHT + 2 * GAP + round(measure.textlength(text))
        if left > GAP and left + width > picture.width:
            left, line = GAP, line + 1
        places.append((left, picture.height + line * LABEL_HEIGHT, text))
        left += width + GAP
    larger = Image.new("RGB", (picture.width, picture.height + (line + 1) * LABEL_HEIGHT + GAP), "white")
    larger.paste(picture)
    draw = ImageDraw.Draw(larger)
    for (x, y, text), colour in zip(places, legend.values(), strict=True):
        draw.rectangle((x, y + 2, x + LABEL_HEIGHT - 4, y + LABEL_HEIGHT - 2), tuple((255 * colour).astype(int)))
        draw.text((x + LABEL_HEIGHT, y + 1), text, fill="black")
    return larger


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The end of a text, as much of it as is no wider than so many pixels, in one line."""
    text = " ".join(text.split())
    if draw.textlength(text) <= width:
        return text
    while len(text) > 1 and draw.textlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, atomically."""
    write_atomic(path, lambda p: picture.save(p, format="PNG"))
