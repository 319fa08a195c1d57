import torch

from sparse_fcmae import UserError
from sparse_fcmae.benchmarks import engine
from sparse_fcmae.benchmarks.engine import Candidate, take_turns
from sparse_fcmae.benchmarks.gates import error_below, falling_loss

CPU = torch.device("cpu")


def test_candidates_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(engine, "_seconds", lambda run, device: float(run()))
    times = {"slow": iter(range(2, 9, 2)), "fast": iter(range(1, 5))}

    def build(name):
        def run():
            order.append(name)
            return next(times[name])

        return run

    found = [Candidate(name, lambda name=name: build(name), {"candidate": name}, images=10) for name in times]
    turns = take_turns(found, 3, CPU)
    assert order == ["slow", "fast"] * 4
    assert turns.seconds == {"slow": [4, 6, 8], "fast": [2, 3, 4]}
    assert turns.ratio("slow", "fast") == 2
    assert turns.ratio("slow", "absent") is None
    assert turns.speed("slow") == {"ms": 6000, "images_per_second": 10 / 6}
    assert turns.rows == {"slow": {"candidate": "slow"}, "fast": {"candidate": "fast"}}


def test_ratios_are_of_an_image():
    turns = engine.Turns({}, {"a": [4.0], "b": [1.0]}, {"a": 8, "b": 1})
    assert turns.ratio("a", "b") == 0.5


def test_a_ratio_is_to_the_fastest_of_each_round():
    turns = engine.Turns(
        {}, {"a": [6.0, 6.0, 6.0], "b": [1.0, 3.0, 2.0], "c": [2.0, 2.0, 9.0]}, {"a": 1, "b": 1, "c": 1}
    )
    assert turns.ratio("a", "b", "c") == 3
    assert turns.ratio("a", "absent", "c") == 3
    assert turns.ratio("a", "absent") is turns.ratio("a") is None


def test_who_is_not_timed_has_the_reason_and_the_others_go_on(monkeypatch):
    def absent():
        raise UserError("it is not installed")

    def hungry():
        raise MemoryError

    def hungry_in_the_second_round():
        if next(calls) == 2:
            raise MemoryError

    def must_not_run():
        raise AssertionError

    def gate(error):
        return lambda run, passed: {"error": error} | error_below(1.0, "its error is {:.0f}")(error)

    calls = iter(range(9))
    found = [
        Candidate("absent", absent),
        Candidate("hungry", hungry),
        Candidate("wrong", lambda: must_not_run, gate=gate(2.0)),
        Candidate("not a number", lambda: must_not_run, gate=gate(float("nan"))),
        Candidate("crowded", lambda: hungry_in_the_second_round),
        Candidate("good", lambda: lambda: None, {"images": 1}, gate=gate(0.5)),
    ]
    turns = take_turns(found, 2, CPU)
    assert {name: row.get("refused") for name, row in turns.rows.items()} == {
        "absent": "it is not installed",
        "hungry": "out of memory",
        "wrong": "its error is 2",
        "not a number": "its error is nan",
        "crowded": "out of memory beside the others",
        "good": None,
    }
    assert turns.rows["wrong"]["error"] == 2
    assert list(turns.seconds) == ["good"]
    assert len(turns.seconds["good"]) == 2


def test_a_loss_has_to_fall():
    rising, falling = iter(range(100)), iter(range(100, 0, -1))
    refused = falling_loss(lambda: [torch.tensor(float(next(rising)))])
    assert refused == {"refused": "its loss does not fall: from 0 to 4"}
    assert falling_loss(lambda: [torch.tensor(float(next(falling)))]) == {}
    assert "nan" in falling_loss(lambda: [torch.tensor(float("nan"))])["refused"]


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with engine.torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
