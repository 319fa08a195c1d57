"""ImageNet-C's folders: one for each corruption, and in it a folder of class folders for each severity."""

import os
from collections.abc import Collection
from pathlib import Path

from sparse_fcmae.data.sources.folder import check_folder

SEVERITIES = 5


def corruption_folders(root: str | os.PathLike, names: Collection[str]) -> dict[str, dict[str, Path]]:
    """For each corruption, by severity, the folder of class folders. names: those of all corruptions.

    Corruptions are looked for one and two levels below `root`. The result is empty where there are none. Raises
    UserError where there is no such folder.
    """
    check_folder(root)
    candidates = [path for path in sorted(Path(root).iterdir()) if path.is_dir()]
    candidates += [path for above in candidates for path in sorted(above.iterdir()) if path.is_dir()]
    found = {}
    for folder in candidates:
        severities = {path.name: path for path in sorted(folder.glob(f"[1-{SEVERITIES}]"))}
        if severities and folder.name in names:
            found[folder.name] = severities
    return found
