"""The command `embed`: an encoder's features of all images of a source, in a file."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_fcmae.data.transform import Transform
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.chunks import Arrays, Chunks, differing, doubt, settings_for
from sparse_fcmae.evaluation.config import EmbedConfig
from sparse_fcmae.evaluation.feature_files import SUFFIXES, Rows, read_features, settings_of, shape_of, write_rows
from sparse_fcmae.evaluation.neighbours import list_duplicates, nearest_to
from sparse_fcmae.evaluation.plots import check_installed
from sparse_fcmae.evaluation.preview import draw_preview
from sparse_fcmae.evaluation.run import EvaluationView, check_any, view_of
from sparse_fcmae.evaluation.samples import Samples, check_apart, check_ending, say_unreadable
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.runtime.distributed import Ranks, process_group
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import check_writable, writing
from sparse_fcmae.runtime.options import check, check_given, check_paths, keywords_of
from sparse_fcmae.weights.read import read_weights

Encode = Callable[[Tensor], Tensor]  # images [B, C, H, W] -> features, a row for each


@keywords_of(EmbedConfig)
def embed(options: dict[str, Any]) -> Path:
    """Writes an encoder's features of images into a file, a row each, and draws and lists what the options ask for.

    What was computed before a call was killed is kept, and the same call goes on from there. Where the file is there
    already, of the same images, weights and options, it is not made again. Returns the file. Raises UserError for what
    the user can put right.
    """
    config = checked(options)
    out = Path(config.out)
    with process_group(config.device) as ranks:
        weights = read_weights(config.init).per_image()
        for note in weights.notes if ranks.main else ():
            print(note)
        view = view_of(config, weights, ranks.device)
        samples = ranks.main_first(lambda: Samples(config.data, view, config))
        settings = settings_for("features", weights, view, samples.source, config)
        settings |= {"stage": config.stage, "maps": config.maps}
        features = features_by(weights.encoder(config.backend).to(ranks.device), config)
        if ranks.by_main(lambda: is_to_be_made(out, settings, config.overwrite)):
            make(out, settings, samples, features, view, ranks, config.overwrite)
        if ranks.main:
            show(out, samples, features, config, view)
    return out


def checked(options: dict[str, Any]) -> EmbedConfig:
    """The config of options. Raises UserError for options that can't be; touches nothing on the disk."""
    check_paths(EmbedConfig, options)
    check_given(options, {"data": "the images", "init": "the weights", "out": "the file for the features"})
    config = EmbedConfig(**options)
    check(config)
    check_ending("out", Path(config.out), SUFFIXES)
    asked = {"preview": config.preview, "duplicates": config.duplicates is not None, "nearest": config.nearest}
    wanting = next((name for name, value in asked.items() if value), None)
    if wanting and config.maps:
        raise UserError(f"`{wanting}` compares whole images: leave out `maps`")
    if config.preview:
        check_installed("preview", "matplotlib", "matplotlib", "plots")
    if config.preview == "umap":
        check_installed("preview=umap", "umap", "umap-learn", "umap")
    if config.nearest and not Path(config.nearest).exists():
        raise UserError(f"`nearest` {config.nearest}: no such file")
    check_apart(config.data, Path(config.out))
    return config


def features_by(encoder: SparseEncoder, config: EmbedConfig) -> Encode:
    """What makes the features of a file of normalised images [B, C, H, W]."""

    def features(images: Tensor) -> Tensor:
        x = encoder(images) if config.stage == 4 else encoder.features(images)[config.stage - 1]
        return x if config.maps else x.float().mean((2, 3))

    return features


def is_to_be_made(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the file is not there yet, or is to be replaced. Raises UserError where it is of other settings."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    if not out.exists() or overwrite:
        return True
    found = settings_of(out)
    if found == settings:
        print(f"{out} is there already, of the same images, weights and options{doubt(settings)}")
        return False
    other = differing(found, settings)
    raise UserError(f"`out` {out} exists, made with another {other}: choose another or give `overwrite=True`")


def make(
    out: Path,
    settings: dict[str, Any],
    samples: Samples,
    features: Encode,
    view: EvaluationView,
    ranks: Ranks,
    overwrite: bool = False,
) -> None:
    """Computes the features of all samples, and writes the file. overwrite: as in `Chunks.begin`."""
    if ranks.main:
        print("\n".join([*samples.notes, f"features of {len(samples)} samples go to {out}"]), flush=True)
    chunks = Chunks(out, settings, samples.source, view)
    lock = ranks.on_main(lambda: chunks.begin(overwrite))
    chunks.make(lambda images: {"features": features(images)}, ranks, "embedding")
    ranks.barrier()
    if not ranks.main:
        return
    bad = [*samples.left_out, *chunks.bad()]
    counts = [len(chunk["sample"]) for chunk in chunks.of()]
    check_any(range(sum(counts)), bad, samples.source)
    write_rows(rows_of(chunks, sum(counts), samples, settings), out)
    say_unreadable(bad, out)
    lock.close()
    chunks.remove()


def rows_of(chunks: Chunks, count: int, samples: Samples, settings: dict[str, Any]) -> Rows:
    """The rows of a file, chunk by chunk."""
    first = next(chunks.of("features"))

    def pieces(*names: str) -> Iterator[Arrays]:
        stored = {"features": "features", "index": "sample", "boxes": "box"}
        for chunk in chunks.of(*(stored[name] for name in names if name in stored)):
            found = {name: chunk[stored[name]] for name in names if name in stored}
            if "files" in names:
                found["files"] = samples.names(chunk["sample"])
            if "labels" in names:
                found["labels"] = samples.labels(chunk["sample"])
            yield found

    return Rows(count, first["features"].shape[1:], settings, samples.classes, pieces, chunks.view.native)


def show(out: Path, samples: Samples, features: Encode, config: EmbedConfig, view: EvaluationView) -> None:
    """Prints where the features are, and draws and lists what the options ask for."""
    rows, *shape = shape_of(out)
    print(f"{out}: {rows} rows of {'x'.join(map(str, shape))} features", flush=True)
    if not (config.nearest or config.preview or config.duplicates is not None):
        return
    found = read_features(out)
    if config.nearest:
        print(nearest_to(features_of_file(config.nearest, features, view), found, config.neighbours))
    if config.duplicates is not None:
        print(list_duplicates(found, config.duplicates, out.with_name(f"{out.name}.duplicates.csv")))
    if config.preview:
        picture = out.with_name(f"{out.name}.preview.png")
        draw_preview(found, samples, view, picture, by="umap" if config.preview == "umap" else "pca")
        print(f"map of the images: {picture}")


@torch.no_grad()
def features_of_file(path: str, features: Encode, view: EvaluationView) -> np.ndarray:
    """The features [D] of one image, or of the window in its middle. Raises UserError where it can't be read."""
    transform = Transform(CentreView(view.size, view.reading, view.crop_fraction, view.native), view.form)
    try:
        image = transform(path)[None].to(view.device)
    except OSError as error:
        raise UserError(f"`nearest` {error}") from None
    with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
        return features(image)[0].float().cpu().numpy()
