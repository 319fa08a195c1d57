"""ImageNet-C's folders: one for each corruption, and in it a folder of class folders for each severity."""

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from sparse_fcmae.data.sources import LabelledSource
from sparse_fcmae.data.sources.class_folder import ClassFolder
from sparse_fcmae.data.sources.folder import check_folder

SEVERITIES = 5


def find_corruptions(
    root: str | os.PathLike, names: Collection[str]
) -> dict[str, dict[str, Callable[[], LabelledSource]]]:
    """For each corruption, by severity, what opens its images. names: those of all corruptions.

    Corruptions are looked for one and two levels below `root`. The result is empty where there are none. Raises
    UserError where there is no such folder.
    """
    check_folder(root)
    candidates = [path for path in sorted(Path(root).iterdir()) if path.is_dir()]
    candidates += [path for above in candidates for path in sorted(above.iterdir()) if path.is_dir()]
    found = {}
    for folder in candidates:
        severities = {path.name: partial(ClassFolder, path) for path in sorted(folder.glob(f"[1-{SEVERITIES}]"))}
        if severities and folder.name in names:
            found[folder.name] = severities
    return found
