"""Files of features, in rows: written piece by piece, and read back.

.npz has an array each, .parquet a column each, of which `features` are lists. .npy has the features alone, and a JSON
file beside it the rest, without which it counts as no file of features. The same rows make the same bytes.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_fcmae.data.decoders.image import library
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line, write_atomic, writing

SUFFIXES = (".npz", ".parquet", ".npy")
SIDES = ("left", "top", "right", "bottom")  # of a window's box
COLUMNS = ("features", "files", "index", "labels", "boxes")
BEGINNING = (1980, 1, 1, 0, 0, 0)  # the time of change in an archive, so that it does not differ from call to call


@dataclass(frozen=True)
class Rows:
    """Rows that are too many for memory.

    count: how many. shape: of one row's features. settings: how they were made. classes: that labels count, or None.
    pieces: a function that gives some rows after the other, as arrays by name: `features` float32 [n, *shape],
    `files` text [n], `index` int64 [n], their number among all samples, and where there are any `labels` int64 [n] and
    `boxes` int32 [n, 4].
    """

    count: int
    shape: tuple[int, ...]
    settings: dict[str, Any]
    classes: tuple[str, ...] | None
    pieces: Callable[..., Iterator[dict[str, np.ndarray]]]
    has_boxes: bool


@dataclass(frozen=True)
class Features:
    """Features that were read, [N, ...], with the names of the images and what else `Rows` has."""

    features: np.ndarray
    files: np.ndarray
    index: np.ndarray
    settings: dict[str, Any]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    boxes: np.ndarray | None = None


def write_rows(rows: Rows, out: Path) -> None:
    """Writes a file, atomically."""
    write = {".npz": _write_npz, ".parquet": _write_parquet, ".npy": _write_npy}[out.suffix]
    with writing(out):
        _beside(out).unlink(missing_ok=True)  # so that at no moment one of a pair is of other features
    write_atomic(out, lambda path: write(rows, path))
    if out.suffix == ".npy":
        content = {"settings": rows.settings, "classes": rows.classes}
        content |= {name: np.concatenate(list(_column(rows, name))).tolist() for name in _names(rows)[1:]}
        write_atomic(_beside(out), lambda path: path.write_text(json.dumps(content) + "\n"))


def shape_of(out: Path) -> tuple[int, ...]:
    """The shape of the features in a file that `write_rows` has written, without reading them."""
    if out.suffix == ".parquet":
        metadata = library("pyarrow.parquet", "datasets").read_metadata(out)
        return (metadata.num_rows, *json.loads(metadata.metadata[b"shape"]))
    if out.suffix == ".npy":
        return np.load(out, mmap_mode="r").shape
    with zipfile.ZipFile(out) as archive, archive.open("features.npy") as file:
        np.lib.format.read_magic(file)
        return np.lib.format.read_array_header_2_0(file)[0]


def settings_of(out: Path) -> dict[str, Any] | None:
    """How the features in a file were made; None where it does not say so."""
    try:
        if out.suffix == ".npz":
            with np.load(out, allow_pickle=False) as arrays:
                return json.loads(str(arrays["settings"]))
        if out.suffix == ".parquet":
            metadata = library("pyarrow.parquet", "datasets").read_schema(out).metadata or {}
            return json.loads(metadata[b"settings"])
        return json.loads(_beside(out).read_text())["settings"]
    except Exception:  # NumPy, pyarrow and json raise many types on a file of another kind
        return None


def read_features(out: Path) -> Features:
    """What a file holds. Raises UserError for one that `write_rows` has not written."""
    try:
        if out.suffix == ".npz":
            with np.load(out, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            found["settings"] = json.loads(str(found["settings"]))
        elif out.suffix == ".parquet":
            found = _read_parquet(out)
        else:
            found = json.loads(_beside(out).read_text()) | {"features": np.load(out, mmap_mode="r")}
    except Exception as error:
        raise UserError(f"{out} can't be read as features: {one_line(error)[:200]}") from None
    arrays = {name: np.asarray(found[name]) for name in COLUMNS if name in found}
    classes = found.get("classes")
    return Features(**arrays, settings=found["settings"], classes=None if classes is None else tuple(map(str, classes)))


def _names(rows: Rows) -> list[str]:
    """The columns that there are, the features first."""
    missing = {"labels": rows.classes is None, "boxes": not rows.has_boxes}
    return [name for name in COLUMNS if not missing.get(name)]


def _column(rows: Rows, name: str) -> Iterator[np.ndarray]:
    return (piece[name] for piece in rows.pieces(name))


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def _write_npz(rows: Rows, path: Path) -> None:
    tails = {"features": rows.shape, "boxes": (4,)}
    longest = max((piece.dtype.itemsize // 4 for piece in _column(rows, "files")), default=1)
    dtypes = {"features": "<f4", "files": f"<U{longest}", "index": "<i8", "labels": "<i8", "boxes": "<i4"}
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name in _names(rows):
            with archive.open(zipfile.ZipInfo(f"{name}.npy", BEGINNING), "w", force_zip64=True) as file:
                _write_array(file, (rows.count, *tails.get(name, ())), dtypes[name], _column(rows, name))
        texts = {"settings": np.array(json.dumps(rows.settings))}
        if rows.classes:
            texts["classes"] = np.array(rows.classes)
        for name, value in texts.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy", BEGINNING), "w") as file:
                _write_array(file, value.shape, value.dtype.str, [value])


def _write_npy(rows: Rows, path: Path) -> None:
    with path.open("wb") as file:
        _write_array(file, (rows.count, *rows.shape), "<f4", _column(rows, "features"))


def _write_array(file: Any, shape: tuple[int, ...], dtype: str, pieces: Any) -> None:
    """An array in NumPy's format, piece by piece."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)
    for piece in pieces:
        file.write(np.ascontiguousarray(piece, dtype=dtype).tobytes())


def _write_parquet(rows: Rows, path: Path) -> None:
    pa, parquet = library("pyarrow", "datasets"), library("pyarrow.parquet", "datasets")
    size = math.prod(rows.shape)
    fields = [pa.field("file", pa.string()), pa.field("index", pa.int64())]
    fields += [pa.field("features", pa.list_(pa.float32(), size))]
    fields += [pa.field("label", pa.string())] if rows.classes else []
    fields += [pa.field(side, pa.int32()) for side in SIDES] if rows.has_boxes else []
    metadata = {"settings": json.dumps(rows.settings), "shape": json.dumps(rows.shape)}
    metadata |= {"classes": json.dumps(rows.classes)} if rows.classes else {}
    schema = pa.schema(fields, metadata=metadata)
    with parquet.ParquetWriter(path, schema) as writer:
        for piece in rows.pieces(*_names(rows)):
            flat = pa.array(piece["features"].reshape(-1), pa.float32())
            columns = [pa.array(piece["files"].tolist()), pa.array(piece["index"])]
            columns.append(pa.FixedSizeListArray.from_arrays(flat, size))
            if rows.classes:
                columns.append(pa.array([rows.classes[label] for label in piece["labels"]]))
            if rows.has_boxes:
                columns += [pa.array(side) for side in piece["boxes"].T]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _read_parquet(path: Path) -> dict[str, Any]:
    table = library("pyarrow.parquet", "datasets").read_table(path)
    metadata = {name: json.loads(table.schema.metadata[name.encode()]) for name in ("settings", "shape")}
    values = table["features"].combine_chunks().flatten().to_numpy()
    found = {
        "settings": metadata["settings"],
        "features": values.reshape(len(table), *metadata["shape"]),
        "files": np.array(table["file"].to_pylist(), dtype=str),
        "index": table["index"].to_numpy(),
    }
    if "label" in table.column_names:
        classes = json.loads(table.schema.metadata[b"classes"])
        place = {name: label for label, name in enumerate(classes)}
        found |= {"classes": classes, "labels": np.array([place[n] for n in table["label"].to_pylist()])}
    if SIDES[0] in table.column_names:
        found["boxes"] = np.stack([table[side].to_numpy() for side in SIDES], 1)
    return found
