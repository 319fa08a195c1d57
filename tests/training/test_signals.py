import signal
import threading
from types import SimpleNamespace

import pytest

from sparse_fcmae.runtime.signals import STOPPING
from sparse_fcmae.training import signals
from sparse_fcmae.training.signals import stop_signals

ONE, IDLE = SimpleNamespace(world=1, main=True), SimpleNamespace(since=None)


@pytest.fixture(autouse=True)
def _heeded():
    """Has no signal be ignored, as SIGHUP is where the tests run under nohup."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in STOPPING if signal.getsignal(n) is signal.SIG_IGN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(signals.time, "monotonic", lambda: time.now)
    return time


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_is_told_and_a_later_one_interrupts(number, capsys, clock):
    before = {n: signal.getsignal(n) for n in STOPPING}
    with stop_signals(ONE, IDLE) as stop:
        assert not stop.agreed(1)
        signal.raise_signal(number)
        assert stop.agreed(2)
        assert capsys.readouterr().err == "\nstopping after this step; once more to stop at once\n"
        clock.now += 1.9
        signal.raise_signal(signal.SIGTERM)  # which batch systems may send twice
        clock.now += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert capsys.readouterr().err == ""
    assert {n: signal.getsignal(n) for n in STOPPING} == before


def test_ctrl_c_twice_interrupts_at_once(clock):
    with stop_signals(ONE, IDLE):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with stop_signals(SimpleNamespace(world=2, main=False), IDLE):  # the terminal sends it, and so does torchrun
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        clock.now += 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_so():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(ONE, IDLE) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.agreed(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_have_no_handlers():
    before, found = signal.getsignal(signal.SIGINT), []

    def look():
        with stop_signals(ONE, IDLE) as stop:
            found.append((stop.agreed(1), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(False, True)]


@pytest.mark.parametrize(("slow", "looks"), [(0.25, [1, 5, 9, 13, 17]), (4.0, range(1, 21)), (1e-9, [1])])
def test_ranks_agree_and_ask_about_every_second(clock, slow, looks):
    """The slower rank says how often; both stop after the same step, of which the signal came to one alone."""
    asked, told = [], []

    def rank(number):
        def gather(value):
            asked.append(value)
            return [value, (bool(told), slow)]

        return SimpleNamespace(world=2, main=number == 0, gather=gather)

    with stop_signals(rank(0), IDLE) as stop:
        found = []
        for step in range(1, 21):
            clock.now += slow / 2
            before = len(asked)
            assert not stop.agreed(step)
            found += [step] * (len(asked) - before)
        assert found == [*looks]
        told.append(True)
        assert any(stop.agreed(step) for step in range(21, 3000))
        assert not any(received for received, _ in asked)
    with stop_signals(rank(1), IDLE) as stop:
        told.clear()
        signal.raise_signal(signal.SIGUSR1)
        stop.agreed(1)
        assert asked[-1][0]


def test_ranks_of_a_resumed_run_ask_about_every_second_too(clock):
    """The steps that were done before took no time of this process."""
    ranks = SimpleNamespace(world=2, main=True, asked=[])
    ranks.gather = lambda value: ranks.asked.append(value) or [value, (False, 0.0)]
    with stop_signals(ranks, IDLE, start=5000) as stop:
        for step in range(5001, 5006):
            clock.now += 4
            stop.agreed(step)
    assert [seconds for _, seconds in ranks.asked] == [4.0] * 5
