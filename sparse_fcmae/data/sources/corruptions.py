"""ImageNet-C's folders: one for each corruption, and in it a folder of class folders for each severity."""

import os
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from sparse_fcmae.data.sources.class_folder import class_folder
from sparse_fcmae.data.sources.folder import check_folder
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.runtime.errors import UserError

SEVERITIES = 5


def find_corruptions(root: str | os.PathLike, names: Collection[str]) -> dict[str, dict[str, Callable[[], Labelled]]]:
    """For each corruption, by severity, what opens its images. names: those of all corruptions.

    Corruptions are looked for one and two levels below `root`. The result is empty where there are none. Raises
    UserError where there is no such folder.
    """
    check_folder(root)
    candidates = folders_in(Path(root))
    candidates += [path for above in candidates for path in folders_in(above)]
    found: dict[str, dict[str, Path]] = {}
    for folder in candidates:
        severities = [path for path in folders_in(folder) if re.fullmatch(f"[1-{SEVERITIES}]", path.name)]
        if folder.name not in names or not any(map(folders_in, severities)):  # a class of that name is none
            continue
        for path in severities:
            other = found.setdefault(folder.name, {}).setdefault(path.name, path)
            if other != path:
                raise UserError(f"{root}: {folder.name} of severity {path.name} is both {other} and {path}: remove one")
    return {
        name: {s: partial(class_folder, path) for s, path in sorted(paths.items())} for name, paths in found.items()
    }


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
