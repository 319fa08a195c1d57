"""Folders that one process at a time works in."""

from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from sparse_fcmae.runtime.errors import UserError

LOCK = ".lock"  # the file in such a folder


def lock_folder(path: Path) -> Any:
    """Keeps other processes out of a folder until what is returned, or the process, is gone.

    Raises UserError where another process keeps this one out. A file system without locks keeps nobody out.
    """
    if fcntl is None:
        return None
    held = (path / LOCK).open("w")
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not shared with forked workers
    except (BlockingIOError, PermissionError):
        raise UserError(f"`out` {path} is in use by another process: wait for it or choose another") from None
    except OSError:
        return None
    return held
