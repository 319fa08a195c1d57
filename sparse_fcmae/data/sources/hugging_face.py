"""Data sets of Hugging Face's library `datasets`: saved folders, Parquet files that hold images, names on the hub.

The library turns Parquet into Arrow files in its own cache once, whose rows are then read from the disk one by one.
"""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders.image import MissingLibrary, library
from sparse_fcmae.data.sources.addresses import file_system, is_address, matching
from sparse_fcmae.data.sources.files import ImageFiles, printable
from sparse_fcmae.data.sources.folder import images_among, paths_below
from sparse_fcmae.data.sources.labelled import Rows, split_of, splits_in
from sparse_fcmae.data.sources.table import USUAL, place_of_column
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line

HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?$")  # hf://datasets/owner/name@revision
SAVED = [("dataset_dict.json",), ("dataset_info.json", "state.json")]  # files in folders that the library has saved
PARQUET = ".parquet"
WHOLE = "whole"  # the name of what has no splits


class DatasetImages:
    """The images that a column of a data set holds as bytes, a row each.

    place: where they are, for messages. data: `datasets.Dataset`. A row without an image is an unreadable image.
    """

    def __init__(self, place: str, data: Any, column: str, notes: Sequence[str]) -> None:
        self.place, self.column, self.notes = place, column, list(notes)
        self.data = data.select_columns([column])
        sizes = library("pyarrow.compute", "datasets").binary_length(_bytes_of(self.data, column))
        digest = hashlib.sha256(sizes.fill_null(-1).to_numpy().astype(np.int64).tobytes())
        for index in np.flatnonzero(sizes.is_null().to_numpy()):
            digest.update(self.name(index).encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.data)

    def __str__(self) -> str:
        return self.place

    def open(self, index: int) -> BinaryIO:
        """An image's bytes, or the file that the row names in their place."""
        value = self.data[int(index)][self.column]
        content, path = (value["bytes"], value["path"]) if isinstance(value, dict) else (value, None)
        if content is None and path:
            return ImageFiles("", "", [path]).open(0)
        if content is None:
            raise OSError("this row has no image")
        return io.BytesIO(content)

    def name(self, index: int) -> str:
        """The row, counted from 0, and the name that the image once had as a file."""
        value = self.data.data.column(self.column)[int(index)]  # of which the bytes are not read
        path = value["path"].as_py() if "path" in str(value.type) else None
        return f"row {index}" + (f" ({printable(os.path.basename(path))})" if path else "")

    def version(self) -> None:
        """Rows may name files, of which the data set does not know when they change."""


def names_dataset(data: str) -> bool:
    """Whether `data` is a saved folder, Parquet files or a folder of them, or a name on the hub."""
    if HUB.match(data) or data.lower().endswith(PARQUET):
        return True
    if not os.path.isdir(data):
        return False
    return _is_saved(data) or (bool(_parquet_in(data)) and not any(images_among(paths_below(data))[0]))


def read_dataset(data: str, config: SourceConfig) -> Rows:
    """The rows of a data set.

    Raises UserError where the library is missing or can't read it, and where no column holds images or paths.
    """
    try:
        splits = _load(data)
        whole = library("datasets", "datasets").concatenate_datasets(list(splits.values()))
    except MissingLibrary as error:
        raise UserError(f"{data}: {error}") from None
    except UserError:
        raise
    except Exception as error:  # of files, the hub, and each of the libraries below
        raise UserError(f"{data}: can't be read: {one_line(error)}") from None
    if not len(whole):
        raise UserError(f"{data}: holds no rows")
    column = _image_column(data, whole, config.path_column)
    labels = _values(data, whole, "label", config.label_column)
    if list(splits) == [WHOLE]:
        in_splits, notes = _values(data, whole, "split", config.split_column), []
    else:
        in_splits = [name for name, part in splits.items() for _ in range(len(part))]
        notes = [f"images of the splits {', '.join(f'{name} ({len(part)})' for name, part in splits.items())}"]
    in_splits = in_splits and [split_of(name) for name in in_splits]
    if _holds_bytes(whole.features[column]):
        whole = _encoded(whole, column)
        return Rows(DatasetImages(data, whole, column, notes), labels, in_splits, strict=list(splits) == [WHOLE])
    root = data if os.path.isdir(data) else os.path.dirname(data)
    return Rows(ImageFiles(data, root, whole[column], notes), labels, in_splits, strict=list(splits) == [WHOLE])


def _load(data: str) -> dict[str, Any]:
    """The parts of a data set by the names of their splits, WHOLE where it has none."""
    datasets = library("datasets", "datasets")
    if on_hub := HUB.match(data):
        found = datasets.load_dataset(on_hub[1], revision=on_hub[2])
    elif os.path.isdir(data) and _is_saved(data):
        found = datasets.load_from_disk(data)
    else:
        if is_address(data):
            file_system(data)  # raises UserError for a library that is missing
        found = datasets.load_dataset("parquet", data_files=_by_split(data))
    return dict(found) if isinstance(found, dict) else {WHOLE: found}


def _by_split(data: str) -> dict[str, list[str]]:
    """Parquet files by the splits that all their names begin with, as train-00000-of-00002.parquet, or as one."""
    files = _parquet_in(data) if os.path.isdir(data) else matching(data)
    if missing := next((file for file in files if not is_address(file) and not os.path.isfile(file)), None):
        raise UserError(f"{missing}: no such file")
    if not files:
        raise UserError(f"{data}: no file matches this pattern")
    files = [file for file in files if is_address(file) or _rows_in(file)]
    if not files:
        raise UserError(f"{data}: holds no rows")
    by_split: dict[str, list[str]] = {}
    for split, file in zip(splits_in(files) or [WHOLE] * len(files), files, strict=True):
        by_split.setdefault(re.sub(r"\W", "_", split), []).append(file)
    return by_split


def _rows_in(file: str) -> int:
    """How many rows a Parquet file has. Raises UserError for a damaged one."""
    try:
        return library("pyarrow.parquet", "datasets").read_metadata(file).num_rows
    except MissingLibrary:
        raise
    except Exception as error:
        raise UserError(f"{file}: can't be read: {one_line(error)}") from None


def _is_saved(folder: str) -> bool:
    """Whether the library has saved a data set in a folder, whole or in splits."""
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in SAVED)


def _parquet_in(folder: str) -> list[str]:
    """The Parquet files in a folder, or else in its folder `data`, where the hub's data sets have them."""
    for place in (Path(folder), Path(folder) / "data"):
        if found := sorted(str(path) for path in place.glob(f"*{PARQUET}") if not path.name.startswith(".")):
            return found
    return []


def _holds_bytes(feature: Any) -> bool:
    """Whether a column of this type holds encoded images: datasets.Image, binary values, or pairs of bytes and path."""
    kind = type(feature).__name__
    if kind in ("Image", "Value"):
        return kind == "Image" or feature.dtype in ("binary", "large_binary")
    return isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()


def _image_column(data: str, whole: Any, asked: str | None) -> str:
    """The column with the images: the one asked for, the one that holds bytes, or one of paths with a usual name."""
    names = whole.column_names
    if asked is not None or not (held := [name for name in names if _holds_bytes(whole.features[name])]):
        place = place_of_column(data, names, "path", asked)
        if place is None:
            raise UserError(f"{data}: no column holds images or paths: name one of {', '.join(names)} by `path_column`")
        return names[place]
    usual = [name for name in held if name.lower() in USUAL["path"]]
    if len(held) > 1 and len(usual) != 1:
        raise UserError(f"{data}: the columns {', '.join(held)} hold images: choose one by `path_column`")
    return (usual or held)[0]


def _encoded(whole: Any, column: str) -> Any:
    """The same data set, whose images are not decoded by the library."""
    datasets = library("datasets", "datasets")
    if type(whole.features[column]).__name__ == "Image":
        whole = whole.cast_column(column, datasets.Image(decode=False))
    return whole.flatten_indices() if whole._indices is not None else whole


def _bytes_of(data: Any, column: str) -> Any:
    """The Arrow column of a data set's encoded images."""
    values = data.data.column(column)
    compute = library("pyarrow.compute", "datasets")
    return compute.struct_field(values, "bytes") if str(values.type).startswith("struct") else values


def _values(data: str, whole: Any, kind: str, asked: str | None) -> list[str] | None:
    """The text in a column of each row, of a class its name, empty where there is none; None without such a column."""
    place = place_of_column(data, whole.column_names, kind, asked)
    if place is None:
        return None
    column = whole.column_names[place]
    feature, values = whole.features[column], whole[column][:]
    if any(isinstance(value, list) for value in values):  # several labels each
        names = getattr(getattr(feature, "feature", None), "names", None)
        return [";".join(names[one] if names else str(one) for one in value or ()) for value in values]
    if names := getattr(feature, "names", None):
        return ["" if value is None or value < 0 else names[value] for value in values]
    return ["" if value is None else str(value).strip() for value in values]
