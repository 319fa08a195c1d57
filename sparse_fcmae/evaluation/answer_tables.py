"""Tables of what a classifier says of each image: .csv, .jsonl or .parquet, written row by row."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_fcmae.data.decoders.image import library
from sparse_fcmae.runtime.files import write_atomic

TABLES = (".csv", ".jsonl", ".parquet")
BLOCK = 10_000  # rows of a group in Parquet
Row = dict[str, Any]


def answer(logits: Tensor, classes: Sequence[str], top: int, task: str = "classification") -> Row:
    """The classes that are most probable by logits [K], and their probabilities, to six digits.

    They are the columns class and probability, class2 and probability2, and so on. Where task is "multilabel" a class
    has a column instead, p_NAME, with its own probability. Where it is "regression" the one column is value.
    """
    if task == "regression":
        return {"value": float(f"{logits.item():.9g}")}
    if task == "multilabel":
        each = zip(classes, logits.float().sigmoid().tolist(), strict=True)
        return {f"p_{name}": float(f"{p:.6g}") for name, p in each}
    probabilities, order = logits.float().softmax(0).topk(min(top, len(classes)))
    row = {}
    for place, (p, label) in enumerate(zip(probabilities.tolist(), order.tolist(), strict=True), 1):
        number = "" if place == 1 else str(place)
        row |= {f"class{number}": classes[label], f"probability{number}": float(f"{p:.6g}")}
    return row


def rows_of(
    names: Iterable[str], logits: Tensor, labels: Sequence[str] | None, classes: Sequence[str], top: int
) -> Iterator[Row]:
    """A row for each image, of logits [N, K]: its name, its label, whether the answer is correct, and that."""
    for number, (name, of_image) in enumerate(zip(names, logits, strict=True)):
        found = answer(of_image, classes, top)
        row: Row = {"file": name}
        if labels is not None:
            row |= {"label": labels[number], "correct": found["class"] == labels[number]}
        yield row | found


def write_table(rows: Iterator[Row], path: Path) -> int:
    """Writes rows that all have the same columns, atomically; returns how many."""
    counted = Counted(rows)
    write = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[path.suffix]
    write_atomic(path, lambda temporary: write(counted, temporary))
    return counted.count


class Counted:
    """An iterator that counts what it gives."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self.rows, self.count = rows, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            self.count += 1
            yield row


def _write_csv(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)


def _write_jsonl(rows: Iterable[Row], path: Path) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_parquet(rows: Iterable[Row], path: Path) -> None:
    pa, parquet = library("pyarrow", "datasets"), library("pyarrow.parquet", "datasets")
    rows, writer = iter(rows), None
    try:
        while block := list(islice(rows, BLOCK)):
            table = pa.Table.from_pylist(block)
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()
