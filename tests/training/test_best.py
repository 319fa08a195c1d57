"""Which evaluation is the best, and when nothing better is to be expected."""

from types import SimpleNamespace

import pytest

from sparse_fcmae import UserError
from sparse_fcmae.training.best import Best


def best(monitor="top1", patience=None, measures=("top1", "loss"), judge="these"):
    return Best(SimpleNamespace(monitor=monitor, patience=patience), measures, judge)


@pytest.mark.parametrize(
    ("monitor", "values", "step"),
    [("top1", (0.1, 0.5, 0.4), 20), ("loss", (3.0, 1.0, 2.0), 20), ("loss", (1, 2, 3), 10)],
)
def test_the_least_loss_or_the_largest_of_anything_else(monitor, values, step):
    found = best(monitor)
    for number, value in enumerate(values, 1):
        found.look(10 * number, {monitor: value})
    assert (found.step, found.value) == (step, values[step // 10 - 1])


def test_a_value_that_is_not_finite_is_never_the_best():
    found = best("loss")
    assert not found.look(1, {"loss": float("nan")})
    assert found.step is None
    assert found.look(2, {"loss": 3.0})
    assert not found.look(3, {"loss": float("nan")})
    assert found.step == 2


def test_patience_is_counted_from_the_best_and_goes_on_after_a_checkpoint():
    found = best(patience=2)
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.6), (4, 0.6)):
        found.look(step, {"top1": value})
        assert not found.ended
    again = best(patience=2)
    again.load_state(found.state())
    again.look(5, {"top1": 0.5})
    assert again.ended
    assert (again.step, again.value) == (3, 0.6)


def test_another_value_starts_anew():
    found = best()
    found.look(1, {"top1": 0.5})
    for other, how in ((best("loss"), "by top1"), (best(judge="others"), "on other images")):
        other.load_state(found.state())
        assert other.step is None
        assert other.notes == [f"the best so far, step 1, was found {how}, and is looked for anew"]
    same = best()
    same.load_state(found.state())
    assert same.notes == []


@pytest.mark.parametrize("monitor", [None, "top1"])
def test_a_checkpoint_of_an_earlier_version_has_no_best(monitor):
    other = best(monitor)
    other.load_state({})
    assert other.step is None


def test_why_a_run_has_ended():
    found = best("loss", patience=1)
    found.look(1, {"loss": float("nan")})
    assert found.ended
    assert (
        found.why()
        == "1 evaluations brought no better loss than none, as it was never finite: raise --patience to go on"
    )


def test_without_a_monitor_nothing_is_the_best():
    found = best(None)
    assert not found.look(1, {"top1": 0.5})
    assert not found.ended


def test_what_is_not_measured_is_refused():
    with pytest.raises(UserError, match="`monitor` top5 is not measured in this run: choose top1 or loss"):
        best("top5")
    with pytest.raises(UserError, match="`monitor` top1 is not measured in this run: this run measures nothing: give"):
        best("top1", measures=())
    with pytest.raises(UserError, match="`patience` needs `monitor`, the value that is to get better: choose top1 or"):
        best(None, patience=3)
