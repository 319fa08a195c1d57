"""Choices among ways to compute the same: the clearly faster one, and the same one ever after."""

import json
import time

import pytest

from sparse_fcmae.runtime import choices


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choices, "_made", {})


def ways(calls=None, **seconds):
    """Ways that take so long, or fail where that is None."""

    def way(name, takes):
        if calls is not None:
            calls.append(name)
        if takes is None:
            raise RuntimeError("not on this machine")
        time.sleep(takes)

    return lambda: {name: lambda name=name, takes=takes: way(name, takes) for name, takes in seconds.items()}


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"mm": 0.02, "onednn": 0.002}, "onednn"),
        ({"mm": 0.002, "onednn": 0.02}, "mm"),
        ({"mm": 0.0200, "onednn": 0.0195}, "mm"),  # not clearly faster
        ({"mm": 0.001, "onednn": None}, "mm"),
    ],
)
def test_the_clearly_faster_way(seconds, chosen):
    assert choices.choose("a product", ways(**seconds)) == chosen


def test_a_choice_holds_in_the_process_and_on_the_machine(tmp_path, monkeypatch):
    calls = []
    assert choices.choose("a product", ways(calls, mm=0.005, onednn=0.0)) == "onednn"
    measured = len(calls)
    assert choices.choose("a product", ways(calls, mm=0.0, onednn=0.005)) == "onednn"
    (file,) = (tmp_path / "sparse-fcmae" / "choices").iterdir()
    assert json.loads(file.read_text()) == {"a product": "onednn"}
    monkeypatch.setattr(choices, "_made", {})  # another process
    assert choices.choose("a product", ways(calls, mm=0.0, onednn=0.005)) == "onednn"
    assert len(calls) == measured
    choices.choose("another", ways(mm=0.0, onednn=0.005))
    assert json.loads(file.read_text()) == {"a product": "onednn", "another": "mm"}


def test_a_run_goes_on_with_its_own_choices():
    choices.choose("a product", ways(mm=0.005, onednn=0.0))
    kept = choices.made()
    assert kept == {"a product": "onednn"}
    choices.take_up({"a product": "mm"})
    assert choices.choose("a product", ways(mm=0.005, onednn=0.0)) == "mm"


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_damaged_cache_is_measured_anew(content):
    choices._file().parent.mkdir(parents=True)
    choices._file().write_text(content)
    assert choices.choose("a product", ways(mm=0.005, onednn=0.0)) == "onednn"


def test_a_cache_that_can_t_be_written_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choices.choose("a product", ways(mm=0.005, onednn=0.0)) == "onednn"
    assert choices.made() == {"a product": "onednn"}
