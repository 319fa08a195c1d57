"""A map of images by their features: alike ones lie together. Needs matplotlib."""

import importlib
from pathlib import Path

import numpy as np
import torch

from sparse_fcmae.evaluation.feature_files import Features
from sparse_fcmae.evaluation.pictures import rgb, shown
from sparse_fcmae.evaluation.plots import plain
from sparse_fcmae.evaluation.run import EvaluationView
from sparse_fcmae.evaluation.samples import Samples
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_atomic

CELLS = 14  # of the map along each side, in each of which one image is shown
POINTS = 20_000  # that are drawn at most, evenly over the rows
LEAST_FOR_UMAP = 16  # images, one more than it looks at around each
LEGEND = 20  # classes that have a colour of their own


def draw_preview(found: Features, samples: Samples, view: EvaluationView, path: Path, by: str) -> None:
    """Writes a PNG of the images' places and of some of the images. by: "pca" or "umap"."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    rows = np.linspace(0, len(found.features) - 1, min(POINTS, len(found.features))).round().astype(int)
    places, axes_names = (_by_umap if by == "umap" else _by_components)(found.features[rows])
    figure = Figure(figsize=(22, 11), layout="constrained")
    points, pictures = figure.subplots(1, 2, sharex=True, sharey=True)
    if found.labels is None or len(found.classes) > LEGEND:
        points.scatter(*places.T, s=12, color="tab:blue", alpha=0.6, linewidths=0)
    else:
        colours = colormaps["tab10" if len(found.classes) <= 10 else "tab20"].colors
        for label, name in enumerate(found.classes):
            own = places[found.labels[rows] == label]
            points.scatter(*own.T, s=14, alpha=0.7, linewidths=0, label=plain(name), color=[colours[label]])
        points.legend(markerscale=2, fontsize=9)
    points.set(xlabel=axes_names[0], ylabel=axes_names[1], title=f"{len(rows)} of {len(found.features)} images")
    chosen = _spread(places)
    for row, tile in zip(chosen, _thumbnails(found.index[rows[chosen]], samples, view), strict=True):
        picture = OffsetImage(tile, zoom=44 / max(tile.shape[:2]))
        pictures.add_artist(AnnotationBbox(picture, places[row], frameon=False, pad=0))
    pictures.set(xlabel=axes_names[0], title=f"{len(chosen)} of them, each in its place")
    write_atomic(path, lambda p: figure.savefig(p, format="png", dpi=90))


def _by_components(features: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """The two principal components of features [N, D]: [N, 2], and the names of the axes."""
    centred = features - features.mean(0)
    values, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    two = vectors[:, :-3:-1]
    two = two * np.sign(two[np.abs(two).argmax(0), [0, 1][: two.shape[1]]])  # so that the map is not mirrored at random
    shares = 100 * values[::-1] / max(values.sum(), 1e-30)
    names = [f"principal component {i + 1} ({share:.0f} % of the variance)" for i, share in enumerate(shares[:2])]
    return centred @ two.astype(np.float32), (names[0], names[1])


def _by_umap(features: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    if len(features) < LEAST_FOR_UMAP:
        raise UserError(f"`preview=umap` needs {LEAST_FOR_UMAP} images at least: give `preview=True`")
    umap = importlib.import_module("umap")  # takes half a minute
    places = umap.UMAP(n_components=2, metric="cosine", random_state=0, n_jobs=1).fit_transform(features)
    return places, ("UMAP 1", "UMAP 2")


def _spread(places: np.ndarray) -> np.ndarray:
    """The rows of places [N, 2] that are nearest to the middle of each cell of a grid over them."""
    low, high = np.quantile(places, (0.005, 0.995), axis=0)
    unit = (places - low) / np.maximum(high - low, 1e-12) * CELLS
    cells = np.floor(unit).astype(int)
    inside = ((cells >= 0) & (cells < CELLS)).all(1)
    distance = np.square(unit - cells - 0.5).sum(1)
    order = np.lexsort((distance, cells[:, 1], cells[:, 0]))
    order = order[inside[order]]
    _, first = np.unique(cells[order], axis=0, return_index=True)
    return order[first]


def _thumbnails(chosen: np.ndarray, samples: Samples, view: EvaluationView) -> list[np.ndarray]:
    """What the model sees of samples, as uint8 [H, W, 3] each."""
    seen = []
    for sample in chosen.tolist():
        with samples.source.open(sample) as file:
            seen.append(view.of_image(file))
    images = view.form.normalise(torch.stack(seen))
    return list(rgb(shown(view.form, images, images)))
