"""Images that a table names, a row each: a .csv or .tsv file with columns for paths, classes and splits."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.sources.addresses import Pieces
from sparse_fcmae.data.sources.files import ImageFiles, leads_somewhere
from sparse_fcmae.data.sources.labelled import Rows, split_of
from sparse_fcmae.runtime.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
USUAL = {  # names of columns, in lower case
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("label", "class", "class_name", "target", "category"),
    "split": ("split", "set", "subset", "partition"),
}


def names_table(data: str | os.PathLike) -> bool:
    """Whether `data` is the path of a table."""
    return os.path.splitext(data)[1].lower() in DELIMITERS


def read_table(data: str | os.PathLike, config: SourceConfig, unique: bool = True) -> Rows:
    """The rows of a table, whose first line names the columns.

    Relative paths start from the folder of the table. unique: whether each path may be there once only. Raises
    UserError where the table can't be read, where a column is missing, and where a row has no path or class.
    """
    file = Path(data)
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            header = stream.readline()
            stream.seek(0)
            semicolons = ";" in header and "," not in header  # as spreadsheets write where commas are decimal
            delimiter = ";" if semicolons else DELIMITERS[file.suffix.lower()]
            lines = list(csv.reader(stream, delimiter=delimiter, strict=True))
    except (OSError, csv.Error) as error:
        raise UserError(f"{file}: can't be read: {error}") from None
    lines = [line for line in lines if line]
    if len(lines) < 2:
        raise UserError(f"{file}: holds no rows: the first line names the columns, each other one an image")
    header, *rows = lines
    if uneven := next((number for number, row in enumerate(rows, 2) if len(row) != len(header)), None):
        raise UserError(f"{file}: row {uneven} has {len(rows[uneven - 2])} columns, and the first line {len(header)}")
    place = {kind: place_of_column(str(file), header, kind, getattr(config, f"{kind}_column")) for kind in USUAL}
    if place["path"] is None:
        raise UserError(f"{file}: no column for the paths: name one of {', '.join(header)} by `path_column`")
    found = {kind: None if at is None else [row[at].strip() for row in rows] for kind, at in place.items()}
    for kind, values in found.items():
        if values is not None and kind != "label" and "" in values:
            raise UserError(f"{file}: row {values.index('') + 2} has no {kind}: give one, or leave the row out")
    _check_paths(file, found["path"], found["label"], unique)
    splits = found["split"] and [split_of(split) for split in found["split"]]
    images = ImageFiles(str(file), file.parent, found["path"], pieces=Pieces(config.cache_gb))
    return Rows(images, found["label"], splits)


def place_of_column(file: str, header: Sequence[str], kind: str, asked: str | None) -> int | None:
    """The place of a column: the one asked for, or the first with a usual name."""
    if asked is not None:
        if asked not in header:
            raise UserError(f"{file}: `{kind}_column` {asked} is none of its columns: {', '.join(header)}")
        return header.index(asked)
    names = [name.strip().lower() for name in header]
    return next((names.index(usual) for usual in USUAL[kind] if usual in names), None)


def _check_paths(file: Path, paths: list[str], labels: list[str] | None, unique: bool) -> None:
    """Raises UserError where a path is there twice and may not be, and where none leads to a file."""
    first: dict[str, int] = {}
    for number, path in enumerate(paths):
        earlier = first.setdefault(path, number)
        if unique and earlier != number:
            two = "" if labels is None or labels[earlier] == labels[number] else ", under two classes"
            raise UserError(f"{file}: {path} is there twice{two}: rows {earlier + 2} and {number + 2}")
    if not leads_somewhere(file.parent, paths):
        raise UserError(f"{file}: no path in it leads to a file: relative ones start from {file.parent}")
