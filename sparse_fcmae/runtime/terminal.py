"""Output whose reader may go away, as `tee` does on Ctrl-C and a pager when it is left."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def lost_if_unread() -> Iterator[None]:
    """Has what is printed within be lost where nobody reads it any more, there and from then on."""
    try:
        yield
    except OSError:
        for stream in (sys.stdout, sys.stderr):
            if is_unread(stream):
                discard(stream)


def is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe or terminal that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll, or a stream that is no file
        return False


def discard(stream: TextIO) -> None:
    """Has all that is written to a stream be lost, what it has not passed on yet included."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
    with suppress(OSError):
        stream.flush()
