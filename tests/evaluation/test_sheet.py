"""Sheets of pictures with names, and with what their colours mean."""

import numpy as np
import pytest

from sparse_fcmae.evaluation.sheet import GAP, LABEL_HEIGHT, captioned, sheet, tiles_of


def test_a_legend_shows_each_colour_once_below_the_pictures():
    columns = {"image": np.zeros((2, 96, 96, 3), np.uint8), "mask": np.zeros((2, 96, 96, 3), np.uint8)}
    colours = {f"class {number}": np.array([number / 9, 1 - number / 9, 0.2]) for number in range(9)}
    colours["a name that is far too long for a picture as narrow as this one is"] = np.array([0.0, 0.0, 1.0])
    plain, explained = (np.asarray(sheet(columns, ["a", "b"], legend)) for legend in ({}, colours))
    assert np.array_equal(plain, explained[: len(plain)])
    below = explained[len(plain) :]
    lines = (len(below) - GAP) / LABEL_HEIGHT
    assert 1 < lines == int(lines) < 10
    for colour in colours.values():
        square = (below == (255 * colour).astype(np.uint8)).all(-1)
        assert square.sum() == (LABEL_HEIGHT - 3) ** 2
        rows, cols = np.nonzero(square)
        assert np.ptp(rows) == np.ptp(cols) == LABEL_HEIGHT - 4


@pytest.mark.parametrize("shape", [(8, 12), (32, 32), (200, 150)])
def test_a_sheet_is_cut_up_as_it_was_drawn(shape):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 3, *shape, 3), dtype=np.uint8)
    drawn = sheet(dict(zip("abcd", pictures, strict=True)))
    tiles = tiles_of(drawn.size, 4, shape)
    assert [len(row) for row in tiles] == [4, 4, 4]
    for row in range(3):
        for column in range(4):
            left, top, width, height = tiles[row][column]
            scale = width // shape[1]
            assert (height, width) == (shape[0] * scale, shape[1] * scale)
            cut = np.asarray(drawn)[top : top + height, left : left + width]
            assert np.array_equal(cut, pictures[column, row].repeat(scale, 0).repeat(scale, 1))


def test_a_caption_of_several_lines_is_one_line():
    tiles = np.zeros((1, 8, 8, 3), np.uint8)
    one, several = (captioned(tiles, [(text, "b")]) for text in ("is a b", "is a\n b"))
    assert np.array_equal(np.asarray(one), np.asarray(several))


def test_a_picture_of_another_layout_is_not_cut_up():
    assert tiles_of((411, 122), 4, (32, 32)) is None
    assert tiles_of((404, 121), 4, (32, 32)) is None
    assert tiles_of((20, 20), 4, (32, 32)) is None
    assert tiles_of((404, 18), 4, (32, 32)) is None
