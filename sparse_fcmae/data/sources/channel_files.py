"""Images whose channels lie in files of their own, such as the wavelengths of a microscope."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from sparse_fcmae.data.decoders.together import FilesTogether
from sparse_fcmae.data.sources.files import Paths, fingerprint_of, open_file, printable, version_of
from sparse_fcmae.data.sources.folder import check_folder, paths_below
from sparse_fcmae.runtime.errors import UserError

NAME = "{name}"
NAMED = 3  # images that a note names


class ChannelFiles:
    """Images below a folder, of which each channel, or several, are a file.

    templates: of the files' paths below the folder, in the order of the channels, with `{name}` for what an image's
    files have in common, as `{name}_w1.tif` and `{name}_w2.tif`. Images without one of the files are left out and
    named in `notes`. Raises UserError for templates that can't be, and where no image has all files.
    """

    def __init__(self, root: str, templates: Sequence[str], without: str | os.PathLike | None = None) -> None:
        check_folder(root)
        templates = [templates] if isinstance(templates, str) else list(templates)
        if wrong := [template for template in templates if template.count(NAME) != 1]:
            raise UserError(
                f"`channel_files` {wrong[0]}: it needs {NAME} once, for what an image's files have in common"
            )
        self.root, self.templates = Path(root), templates
        patterns = [re.compile("(.+)".join(map(re.escape, template.split(NAME)))) for template in templates]
        found: dict[str, set[int]] = defaultdict(set)
        for path in paths_below(root, without):
            for number, pattern in enumerate(patterns):
                if match := pattern.fullmatch(path):
                    found[match[1]].add(number)
        whole = sorted(name for name, there in found.items() if len(there) == len(templates))
        parts = sorted(found.keys() - set(whole))
        if not whole:
            raise UserError(f"{root}: no image has all of the files {', '.join(templates)}")
        self.names, self.notes = Paths(whole), []
        if parts:
            named = ", ".join(map(printable, parts[:NAMED])) + (", ..." if len(parts) > NAMED else "")
            self.notes.append(f"left out, as {len(parts)} images lack some of their channels' files: {named}")
        self.fingerprint = fingerprint_of([*templates, *whole])

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return str(self.root)

    def open(self, index: int) -> BinaryIO:
        """The bytes of an image's files."""
        name = self.names[index]
        contents = []
        for template in self.templates:
            with open_file(self.root / template.replace(NAME, name)) as file:
                contents.append(file.read())
        return FilesTogether(contents)

    def name(self, index: int) -> str:
        """What an image's files have in common."""
        return printable(self.names[index])

    def version(self) -> str | None:
        """A digest of the files' sizes and times of change."""
        names = (template.replace(NAME, name) for name in self.names for template in self.templates)
        return version_of(self.root, names)
