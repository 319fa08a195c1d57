"""The user's cache: what takes time to find out and can be found out again."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME/sparse-fcmae/<name>, or ~/.cache in its place. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-fcmae" / name
