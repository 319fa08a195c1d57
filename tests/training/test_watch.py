"""Which rank the others wait for."""

from types import SimpleNamespace

import pytest

from sparse_fcmae.training.log import RunLog
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


class Store:
    """What other ranks have said; None after it has gone with the process that kept it."""

    def __init__(self, signs):
        self.signs = signs

    def set(self, key, value):
        if self.signs is None:
            raise RuntimeError("gone")
        self.signs[key] = value

    def check(self, keys):
        if self.signs is None:
            raise RuntimeError("gone")
        return keys[0] in self.signs

    def get(self, key):
        return self.signs[key].encode()


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("resting", [False, True])
def test_a_rank_that_is_silent_is_found_in_an_evaluation_too(monkeypatch, resting, gone):
    monkeypatch.setattr("sparse_fcmae.training.watch.BEAT", 0.001)
    ended, made = [], watch((Sign(-1, -1, False), 0), (Sign(-1, -1, False), 0))
    made.store, made.seconds, made.resting = Store(None if gone else {"1": "3,7,0"}), 0.05, resting

    def end(seconds):
        ended.append((made.hanging(), seconds))
        made._over.set()

    monkeypatch.setattr(made, "_end", end)
    made._look()
    ((hanging, what), seconds) = ended[0]
    assert 1 in hanging
    assert seconds >= 0.05
    if resting or gone:
        assert what == "gives no sign of life"


@pytest.mark.parametrize("hanging", [0, 1])
def test_the_log_names_the_rank_whichever_that_is(tmp_path, monkeypatch, hanging):
    log = RunLog(tmp_path, 0, 5, hanging != 0)  # of the rank that is left
    ranks = SimpleNamespace(world=2, rank=1 - hanging)
    made = Watch(ranks, SimpleNamespace(since=None), 1.0, 3, log.last_words)
    made._last = [(Sign(9, 3, False), SILENT if rank == hanging else 0) for rank in range(2)]
    monkeypatch.setattr("os._exit", lambda code: None)
    made._end(60.0)
    log.close()
    expected = f"no step for 60 seconds after step 3: rank {hanging} gives no sign of life"
    assert (tmp_path / "train.log").read_text().endswith(f"{expected}\n")


def test_one_process_has_nobody_to_watch():
    with watch((Sign(0, 0, False), 0)) as made:
        assert not hasattr(made, "store")


def test_it_rests_in_an_evaluation():
    made = watch((Sign(0, 0, False), 0))
    with made.rest():
        assert made.resting
    assert not made.resting
