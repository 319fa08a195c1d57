"""Rows of metrics that are read while they are written, and curves of them."""

import json
import math

import numpy as np
import pytest

from sparse_fcmae.runtime.rows import MOST, Rows


def line(step, **values):
    return json.dumps({"step": step, "epoch": step / 10, **values}) + "\n"


def test_rows_are_read_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path)
    rows.read_on()
    assert (rows.count, rows.curve("loss")) == (0, None)
    path.write_text(line(1, loss=3.0) + line(2, loss=None) + '{"step": 3, "lo')
    rows.read_on()
    assert rows.count == 2
    with path.open("a") as file:
        file.write('ss": 1.0, "knn": 0.5}\n')
    rows.read_on()
    assert np.array_equal(rows.numbers("loss"), [3.0, math.nan, 1.0], equal_nan=True)
    assert np.array_equal(rows.numbers("knn"), [math.nan, math.nan, 0.5], equal_nan=True)
    assert (rows.last("loss"), rows.last("knn"), rows.last("other"), rows.damaged) == (1.0, 0.5, None, 0)
    assert rows.curve("loss") == {"each": 1, "step": [1.0, 3.0], "epoch": [0.1, None], "value": [3.0, 1.0]}


def test_a_file_that_takes_another_ones_place_is_read_anew(tmp_path):
    """On many file systems it gets the number of the file that was deleted."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(n, loss=9.0) for n in range(1, 11)))
    rows = Rows(path)
    rows.read_on()
    path.unlink()
    path.write_text("".join(line(n, loss=1.0) for n in range(1, 21)))
    rows.read_on()
    assert rows.numbers("loss").tolist() == [1.0] * 20


@pytest.mark.parametrize("replace", [True, False])
def test_another_file_is_read_from_its_beginning(tmp_path, replace):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, loss=1.0) + line(2, loss=2.0) + line(3, loss=3.0))
    rows = Rows(path)
    rows.read_on()
    other = tmp_path / "other" if replace else path
    other.write_text(line(1, loss=5.0))
    if replace:
        other.replace(path)
    rows.read_on()
    assert rows.numbers("loss").tolist() == [5.0]
    path.unlink()
    rows.read_on()
    assert rows.count == 0


def test_lines_that_are_no_rows_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    huge = '{"step": 1, "loss": ' + "9" * 400 + "}\n"
    path.write_text("[]\n" + line(1, loss=1.0) + "x\n" + '{"step": "1"}\n' + "\n" + huge)
    rows = Rows(path)
    rows.read_on()
    assert (rows.count, rows.damaged) == (1, 5)


@pytest.mark.parametrize("count", [MOST, MOST + 1, 10 * MOST - 3])
def test_a_long_curve_keeps_its_mean_and_its_peaks(tmp_path, count):
    values = np.random.default_rng(0).normal(size=count)
    values[count // 3], values[-1] = 1e6, -1e6
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(n + 1, loss=value) for n, value in enumerate(values)))
    rows = Rows(path)
    rows.read_on()
    curve = rows.curve("loss", scale=2.0)
    each = -(-count // MOST)
    assert curve["each"] == each
    assert len(curve["value"]) == -(-count // each) <= MOST
    parts = [2 * values[first : first + each] for first in range(0, count, each)]
    assert np.allclose(curve["value"], [part.mean() for part in parts], rtol=1e-5)
    assert ("low" in curve) == (each > 1)
    if each > 1:
        assert np.allclose(curve["low"], [part.min() for part in parts], rtol=1e-5)
        assert np.allclose(curve["high"], [part.max() for part in parts], rtol=1e-5)
    assert curve["step"] == sorted(curve["step"])
