"""The command `analyze`: whether the features of encoders have collapsed, measured on images without labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_fcmae.data.batches import Batch
from sparse_fcmae.data.sources import BadImage
from sparse_fcmae.evaluation.collapse import BlockStatistics, expanded_features, rank_me
from sparse_fcmae.evaluation.config import AnalyzeConfig
from sparse_fcmae.evaluation.plots import check_installed, draw_curves
from sparse_fcmae.evaluation.run import EvaluationView, check_any, together, view_of
from sparse_fcmae.evaluation.samples import EXPORTED, UNFIT, Samples, check_apart, say_unreadable, spread_batches
from sparse_fcmae.evaluation.sheet import save_picture, sheet
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import write_json, writing
from sparse_fcmae.runtime.options import check, check_given, check_paths, keywords_of, paths_of
from sparse_fcmae.weights.read import read_weights

REPORT, COLLAPSE, SPECTRUM = "analysis.json", "collapse.png", "spectrum.png"  # files in the folder `out`
CHANNEL_MAPS, LONGEST = "channels-{}.png", 80  # a file for each encoder, by so many letters of its name
CHANNELS = 64  # whose maps are drawn, as in the paper's figure 2
SHOWN_STAGE, SIDE = "3", 64  # of whose last block they are, and how many pixels a map is to have along a side


@dataclass(frozen=True)
class Analysis:
    """What was found of an encoder.

    blocks: in their order. embeddings: float32 [N, D]. maps: of the last block of SHOWN_STAGE, [C, H, W] of one image.
    bad: the images that were left out, as they can't be read.
    """

    name: str
    weights: str
    blocks: list[BlockStatistics]
    embeddings: Tensor
    maps: Tensor
    bad: list[BadImage]

    def as_json(self) -> dict[str, Any]:
        """All numbers."""
        values = torch.linalg.svdvals(self.embeddings.double())
        return {
            "weights": self.weights,
            "images": len(self.embeddings),
            "blocks": [{"name": b.name, "distance": b.distance, "dead": b.dead} for b in self.blocks],
            "effective_rank": rank_me(self.embeddings),
            "dimensions": self.embeddings.shape[1],
            "singular_values": values.tolist(),
        }


@keywords_of(AnalyzeConfig)
def analyze(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures feature collapse block by block and the rank of the embeddings, of one encoder or several.

    Prints a line for each, draws what it found into `out` and returns the numbers. Raises UserError for what the user
    can put right.
    """
    check_paths(AnalyzeConfig, options)
    check_given(options, {"data": "the images", "init": "the weights", "out": "a folder for the pictures"})
    config = AnalyzeConfig(**options)
    check(config)
    inits = paths_of(config.init)
    for init in inits:
        read_weights(init)  # whatever is wrong with one of them is said before any is run
    out = folder_for(config)
    analyses = [analyzed(config, init, name) for init, name in zip(inits, names_of(inits), strict=True)]
    found = [analysis.as_json() for analysis in analyses]
    with writing(out):
        for path in out.glob(CHANNEL_MAPS.format("*")) if (out / REPORT).exists() else ():  # of an earlier analysis
            path.unlink()
    drawn = draw(analyses, found, out)
    write_json(out / REPORT, found)
    print("\n".join([*report(analyses, found), f"pictures in {out}: {', '.join(drawn)}"]))
    say_unreadable(together([analysis.bad for analysis in analyses]), out)
    return found


def folder_for(config: AnalyzeConfig) -> Path:
    """The folder for the pictures, which is made. Raises UserError where it can't be, or holds an analysis."""
    out = Path(config.out)
    if (out / REPORT).exists() and not config.overwrite:
        raise UserError(f"`out` {out} holds an analysis: choose another or give `overwrite=True`")
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` {out} is a file: name a folder")
    check_apart(config.data, out)
    check_installed("out", "matplotlib", "matplotlib", "plots")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return out


def names_of(inits: list[str]) -> list[str]:
    """What weights are called in pictures: by the last part of their paths, or the whole where that is not enough."""
    paths = [Path(init) for init in inits]
    short = [(path.parent if path.name.startswith(EXPORTED) else path).name for path in paths]
    return short if len(set(short)) == len(short) else inits


def analyzed(config: AnalyzeConfig, init: str, name: str) -> Analysis:
    """What is found of one encoder over the images."""
    weights = read_weights(init).per_image()
    view = view_of(config, weights)
    samples = Samples(config.data, view, config)
    print("\n".join([*weights.notes, *samples.notes]), flush=True)
    encoder = weights.encoder(config.backend).to(view.device)
    blocks: dict[str, BlockStatistics] = {}
    embeddings, first, bad = [], None, list(samples.left_out)
    total = min(config.images, len(samples))
    with tqdm(total=total, desc=name, unit="image", dynamic_ncols=True) as bar:
        for batch, readable in spread_batches(samples, view, config.images):
            bad += batch.bad
            for block, maps in features_of_batch(encoder, view, batch) if readable else ():
                if block == "output":
                    embeddings.append(maps.mean((2, 3)).cpu())
                    continue
                blocks.setdefault(block, BlockStatistics(block)).add(maps)
                if block.startswith(SHOWN_STAGE) and not embeddings:
                    first = maps[0].cpu()
            bar.update(len(readable) + len(batch.bad))
    check_any(embeddings, bad, samples.source)
    return Analysis(name, init, list(blocks.values()), torch.cat(embeddings), first, bad)


@torch.no_grad()
def features_of_batch(encoder: SparseEncoder, view: EvaluationView, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """What `expanded_features` gives of a batch as it was read, float32."""
    images = view.form.normalise(batch.pixels.to(view.device))
    with torch.autocast(view.device.type, torch.bfloat16, enabled=view.bf16):
        for block, maps in expanded_features(encoder, images):
            yield block, maps.float()


def draw(analyses: list[Analysis], found: list[dict[str, Any]], out: Path) -> list[str]:
    """Draws the distances by block, the spectra, and the maps of channels. Returns the files' names."""
    curves = {}
    for analysis in analyses:
        depths = np.linspace(0, 1, len(analysis.blocks)) if len(analysis.blocks) > 1 else [0.0]
        curves[analysis.name] = (depths, [block.distance for block in analysis.blocks])
    labels = ("depth of the block, from the first to the last", "distance between its channels")
    draw_curves(curves, *labels, out / COLLAPSE, floor=0.0)
    spectra = {}
    for analysis, numbers in zip(analyses, found, strict=True):
        values = np.array(numbers["singular_values"])
        spectra[analysis.name] = (np.arange(1, len(values) + 1), values / max(values[0], 1e-300))
    draw_curves(spectra, "number", "singular value by the first", out / SPECTRUM, log=True)
    drawn = [COLLAPSE, SPECTRUM]
    for number, analysis in enumerate(analyses):
        drawn.append(CHANNEL_MAPS.format(f"{number + 1}-{UNFIT.sub('-', analysis.name)[-LONGEST:]}"))
        save_picture(sheet({f"64 channels of {analysis.name}": channel_sheet(analysis.maps)[None]}), out / drawn[-1])
    return drawn


def channel_sheet(maps: Tensor) -> np.ndarray:
    """The first CHANNELS of an image's maps [C, H, W] in a square, uint8 [height, width, 3], each with a white border.

    All have one scale of grey, so that constant channels and saturated ones show as such.
    """
    shown = maps[:CHANNELS].numpy()
    low, high = np.quantile(shown, (0.01, 0.99))
    grey = (255 * ((shown - low) / max(high - low, 1e-12)).clip(0, 1)).astype(np.uint8)
    side, larger = int(np.ceil(np.sqrt(len(grey)))), max(1, SIDE // max(grey.shape[1:]))
    grey = grey.repeat(larger, 1).repeat(larger, 2)
    _, height, width = grey.shape
    picture = np.full((side * (height + 1), side * (width + 1)), 255, np.uint8)
    for number, channel in enumerate(grey):
        top, left = number // side * (height + 1), number % side * (width + 1)
        picture[top : top + height, left : left + width] = channel
    return np.repeat(picture[..., None], 3, 2)


def report(analyses: list[Analysis], found: list[dict[str, Any]]) -> list[str]:
    """What was found, for people: two lines for each encoder."""
    lines = []
    for analysis, numbers in zip(analyses, found, strict=True):
        distances = [block.distance for block in analysis.blocks]
        least = int(np.argmin(distances))
        dead = max(analysis.blocks, key=lambda block: block.dead)
        lines.append(
            f"{analysis.name}: the distance between channels is {np.mean(distances):.3f} in the mean over blocks, and "
            f"least in block {analysis.blocks[least].name}, {distances[least]:.3f}; constant channels are at most "
            f"{100 * dead.dead:.1f} %, in block {dead.name}"
        )
        lines.append(
            f"{analysis.name}: the embeddings of {numbers['images']} images fill {numbers['effective_rank']:.1f} of "
            f"{numbers['dimensions']} dimensions"
        )
    return lines
