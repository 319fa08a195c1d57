import os
import sys

from sparse_fcmae.runtime.terminal import lost_if_unread


def pipe_of_stdout(monkeypatch):
    """The file that reads what is printed."""
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    return os.fdopen(reading)


def test_what_nobody_reads_is_lost_and_no_error(monkeypatch):
    with pipe_of_stdout(monkeypatch) as reader:
        with lost_if_unread():
            print("read", flush=True)
        assert reader.readline() == "read\n"
    with lost_if_unread():
        print("lost", flush=True)
    print("lost without a word", flush=True)
    sys.stdout.close()


def test_output_that_is_read_stays_after_another_error(monkeypatch):
    with pipe_of_stdout(monkeypatch) as reader:
        with lost_if_unread():
            raise OSError("of another kind")
        print("read", flush=True)
        assert reader.readline() == "read\n"
        sys.stdout.close()
