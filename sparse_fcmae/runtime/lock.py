"""Folders that one process at a time works in."""

from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from sparse_fcmae.runtime.errors import UserError

LOCK = ".lock"  # the file in such a folder


def is_locked(path: Path) -> bool:
    """Whether another process works in a folder at this moment."""
    if fcntl is None or not (path / LOCK).is_file():
        return False
    with (path / LOCK).open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            pass
    return False


def lock_folder(path: Path) -> TextIO:
    """Keeps other processes out of a folder until the file that it returns is closed, or the process is gone.

    Raises UserError where another process keeps this one out. On Windows, or on a file system without locks, none does.
    """
    held = (path / LOCK).open("w")
    if fcntl is None:
        return held
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not shared with forked workers
    except (BlockingIOError, PermissionError):
        held.close()
        raise UserError(f"`out` {path} is in use by another process: wait for it or choose another") from None
    except OSError:
        pass
    return held
