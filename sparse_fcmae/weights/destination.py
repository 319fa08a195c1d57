"""Where a conversion goes: refused before anything there is lost, written beside it, and moved into place."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import new_folder, write_atomic, writing
from sparse_fcmae.weights.adapter import CARD, Target
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.card import OURS

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".onnx", ".pt2", ".bin", ".ckpt")  # how files with weights end
WRITTEN = {name for target in TARGETS.values() for name in target.folder_files()}


@dataclass(frozen=True)
class Destination:
    """The folder, or the file of the weights alone, that a user wants a target's form of some weights to be in."""

    path: Path
    target: Target

    @property
    def is_file(self) -> bool:
        """Whether it is to be a file, which the ending of its name tells."""
        return self.path.suffix in self.target.suffixes

    def __post_init__(self) -> None:
        """Raises UserError for a file that ends as no file of the target does."""
        if self.path.suffix in WEIGHTS_SUFFIXES and not self.is_file:
            raise UserError(
                f"`to={self.target.name}` can't write {self.path}: name a folder, or a file that ends in "
                f"{', '.join(self.target.suffixes)}"
            )

    def check(self, source: Path, overwrite: bool) -> None:
        """Raises UserError where it can't be used as asked. source: the file of weights that is to be converted."""
        path = self.path
        if source.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{source} would be replaced by its own conversion: choose another destination than {path}")
        if self.is_file:
            self._check_file(overwrite)
        else:
            self._check_folder(overwrite)

    def _check_file(self, overwrite: bool) -> None:
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder: name another")
        for file in self.target.files(self.path):
            if file.exists() and not overwrite:
                raise UserError(f"{file} is there already: choose another or give `overwrite=True`")

    def _check_folder(self, overwrite: bool) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: name a folder")
        if not path.is_dir() or not any(path.iterdir()):
            return
        if not overwrite:
            raise UserError(f"{path} is not empty: choose another folder or give `overwrite=True`")
        foreign = {file.name for file in path.iterdir()} - WRITTEN
        card = path / CARD
        if card.is_file() and OURS not in card.read_text(errors="replace"):
            foreign.add(CARD)  # someone has written it
        if foreign:
            raise UserError(f"{path} holds more than a conversion ({min(foreign)}): choose another folder")

    @contextmanager
    def written_beside(self, dry_run: bool) -> Iterator[Path]:
        """The path of a folder or file to write, which becomes the destination when the block ends well.

        The folder is there and empty, the file is not there yet. After a dry run nothing is left of either.
        """
        if dry_run:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary) / self.path.name if self.is_file else Path(temporary)
        elif self.is_file:
            with self._file_beside() as file:
                yield file
        else:
            with new_folder(self.path) as folder:
                yield folder

    @contextmanager
    def _file_beside(self) -> Iterator[Path]:
        """The path of a file to write in a folder beside the destination, moved with all that lies beside it."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=f".{self.path.name}.", dir=self.path.parent)
        with temporary as folder:
            yield Path(folder) / self.path.name
            made = sorted(Path(folder).iterdir(), reverse=True)  # an ONNX graph comes after its data
            for file in made:
                write_atomic(self.path.with_name(file.name), partial(os.replace, file))
        for file in self.target.files(self.path):
            if file.name not in {new.name for new in made}:
                file.unlink(missing_ok=True)  # of an earlier conversion
