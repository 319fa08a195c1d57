"""Which images are alike: by the cosine of their features, from which the mean of all was taken."""

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparse_fcmae.evaluation.feature_files import Features
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic

EXACT = 200_000  # rows up to which all pairs are compared; from there on an index finds the neighbours
BLOCK = 2048  # rows that are compared with all others at once
OF_EACH = 32  # neighbours of a row that an index looks for
PRINTED = 10  # pairs


def directions(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of length 1, float32 [N, D], of features [N, D] without their mean; and that mean, [D]."""
    mean = features.mean(0, dtype=np.float64).astype(np.float32)
    centred = features - mean
    return centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12), mean


def nearest_to(query: np.ndarray, found: Features, count: int) -> str:
    """A table of the rows that are most similar to features [D], the most similar first."""
    known, mean = directions(found.features)
    asked = (query - mean) / max(np.linalg.norm(query - mean), 1e-12)
    similarity = known @ asked
    order = np.argsort(-similarity, kind="stable")[:count]
    lines = [f"{similarity[row]:10.4f}  {_name(found, row)}" for row in order]
    return "\n".join(["similarity  image", *lines])


def pairs_above(found: Features, least: float) -> list[tuple[float, int, int]]:
    """All pairs of rows with at least so great a similarity, the most similar first.

    Of more than EXACT rows the index of faiss finds those among OF_EACH neighbours of each. Raises UserError where it
    is needed and not installed.
    """
    known, _ = directions(found.features)
    pairs = _all_pairs(known, least) if len(known) <= EXACT else _pairs_of_index(known, least)
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))


def _all_pairs(known: np.ndarray, least: float) -> Iterator[tuple[float, int, int]]:
    for start in range(0, len(known), BLOCK):
        similarity = known[start : start + BLOCK] @ known[start:].T
        rows, others = np.nonzero(np.triu(similarity >= least, 1))
        for row, other in zip(rows.tolist(), others.tolist(), strict=True):
            yield float(similarity[row, other]), start + row, start + other


def _pairs_of_index(known: np.ndarray, least: float) -> Iterator[tuple[float, int, int]]:
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        needs = "needs faiss: pip install faiss-cpu (the extra search)"
        raise UserError(f"`duplicates` among more than {EXACT} images {needs}") from None
    index = faiss.index_factory(known.shape[1], f"IVF{round(4 * len(known) ** 0.5)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(known)
    index.add(known)
    index.nprobe = 16
    for start in range(0, len(known), BLOCK):
        similarity, others = index.search(known[start : start + BLOCK], OF_EACH)
        for row, other in zip(
            *np.nonzero((similarity >= least) & (others > np.arange(start, start + len(others))[:, None])), strict=True
        ):
            yield float(similarity[row, other]), start + int(row), int(others[row, other])


def list_duplicates(found: Features, least: float, table: Path) -> str:
    """Writes a CSV of the pairs of rows that are at least so similar, and returns what there is to say."""
    pairs = pairs_above(found, least)

    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["similarity", "image", "other"])
            writer.writerows([f"{s:.6f}", _name(found, a), _name(found, b)] for s, a, b in pairs)

    write_atomic(table, write)
    lines = [f"{s:10.4f}  {_name(found, a)}  {_name(found, b)}" for s, a, b in pairs[:PRINTED]]
    return "\n".join([f"{len(pairs)} pairs are at least {least:g} similar, in {table}", *lines])


def _name(found: Features, row: int) -> str:
    """An image's name, with a window's place."""
    name = str(found.files[row])
    return name if found.boxes is None else f"{name} at {','.join(map(str, found.boxes[row]))}"
