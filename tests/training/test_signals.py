import signal
import threading

import pytest

from sparse_fcmae.training.signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_told_and_ctrl_c_after_it_interrupts(number, capsys):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with stop_signals(world=1) as stopped:
        assert not stopped()
        signal.raise_signal(number)
        assert stopped()
        assert capsys.readouterr().err == "\nstopping after this step; Ctrl-C to stop at once\n"
        signal.raise_signal(signal.SIGTERM)  # which batch systems may send twice
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err == ""
    assert {n: signal.getsignal(n) for n in before} == before


def test_many_processes_and_other_threads_have_no_handlers():
    before, found = signal.getsignal(signal.SIGINT), []

    def look(world):
        with stop_signals(world) as stopped:
            found.append((stopped(), signal.getsignal(signal.SIGINT) is before))

    look(2)
    thread = threading.Thread(target=look, args=(1,))
    thread.start()
    thread.join()
    assert found == [(False, True), (False, True)]
