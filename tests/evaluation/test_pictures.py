"""Sheets of pictures with names, and with what their colours mean."""

import numpy as np

from sparse_fcmae.evaluation.pictures import GAP, LABEL_HEIGHT, sheet


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
