"""Which rank the others wait for."""

from types import SimpleNamespace

import pytest

from sparse_fcmae.training.watch import SILENT, Sign, Watch


def watch(*signs, rank=0):
    """A watch that knows these signs of the ranks, each with how many beats it is that."""
    ranks = SimpleNamespace(world=len(signs), rank=rank)
    made = Watch(ranks, SimpleNamespace(since=None), 1.0, 0, lambda text: None)
    made._last = list(signs)
    return made


@pytest.mark.parametrize(
    ("signs", "hanging"),
    [
        ([(Sign(9, 5, False), 0), (Sign(4, 5, False), SILENT)], ([1], "gives no sign of life")),
        ([(Sign(9, 5, False), 0), (Sign(9, 5, True), 0)], ([1], "waits for images")),
        ([(Sign(9, 6, True), 0), (Sign(9, 5, False), 0)], ([1], "does not go on")),
        ([(Sign(9, 5, False), 0), (Sign(9, 5, True), 1), (Sign(9, 5, True), 0)], ([1, 2], "waits for images")),
        ([(Sign(9, 5, False), 0), (Sign(9, 5, False), 0)], ([0, 1], "does not go on, as all others")),
        ([(Sign(-1, -1, False), SILENT), (Sign(9, 0, False), 0)], ([0], "gives no sign of life")),
    ],
)
def test_who_hangs(signs, hanging):
    assert watch(*signs).hanging() == hanging


def test_one_process_has_nobody_to_watch():
    with watch((Sign(0, 0, False), 0)) as made:
        assert not hasattr(made, "store")


def test_it_rests_in_an_evaluation():
    made = watch((Sign(0, 0, False), 0))
    with made.rest():
        assert made.resting
    assert not made.resting
