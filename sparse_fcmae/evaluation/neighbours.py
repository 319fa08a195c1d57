"""Which images are alike: by the cosine of their features, from which the mean of all was taken where they are many."""

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
FEW = 10  # rows below which their mean says nothing
ROUNDING = 1e-5  # of float32, by which copies may be less alike than 1
PRINTED = 10  # pairs


def directions(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32 [N, D + 1], of features [N, D] without the mean.

    The last value is 1 in rows that are the mean itself, and have no direction, so that these are alike; else it is 0.
    """
    centred = features - mean
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    none = length <= ROUNDING * np.linalg.norm(features, axis=1, keepdims=True)
    return np.concatenate([np.where(none, 0, centred / np.where(none, 1, length)), none], 1).astype(np.float32)


def mean_of(features: np.ndarray) -> np.ndarray:
    """The mean of features [N, D] that is taken from them: zeros for fewer rows than FEW."""
    if len(features) < FEW:
        return np.zeros(features.shape[1], np.float32)
    return features.mean(0, dtype=np.float64).astype(np.float32)


def nearest_to(query: np.ndarray, found: Features, count: int) -> str:
    """A table of the rows that are most similar to features [D], the most similar first."""
    mean = mean_of(found.features)
    similarity = directions(found.features, mean) @ directions(query[None], mean)[0]
    order = np.argsort(-similarity, kind="stable")[:count]
    lines = [f"{similarity[row]:10.4f}  {_name(found, row)}" for row in order]
    return "\n".join(["similarity  image", *lines])


def pairs_above(found: Features, least: float) -> list[tuple[float, int, int]]:
    """All pairs of rows with at least so great a similarity, the most similar first.

    Of more than EXACT rows the index of faiss finds those among OF_EACH neighbours of each. Raises UserError where it
    is needed and not installed.
    """
    known = directions(found.features, mean_of(found.features))
    find = _all_pairs if len(known) <= EXACT else _pairs_of_index
    pairs = find(known, least - ROUNDING)
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
    pairs = {}
    for start in range(0, len(known), BLOCK):
        similarity, others = index.search(known[start : start + BLOCK], OF_EACH)
        for row, column in zip(*np.nonzero((similarity >= least) & (others >= 0)), strict=True):
            one, other = start + int(row), int(others[row, column])
            if one != other:  # either may be among the neighbours of the other alone
                pairs[min(one, other), max(one, other)] = float(similarity[row, column])
    return ((similarity, *pair) for pair, similarity in pairs.items())


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
