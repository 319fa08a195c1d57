"""What the models cost, counted: dense and sparse, beside the published figures and other libraries' models."""

from collections.abc import Iterator

import torch

from sparse_fcmae.benchmarks.config import GflopsConfig
from sparse_fcmae.benchmarks.engine import benchmark
from sparse_fcmae.benchmarks.results import Columns, Row
from sparse_fcmae.benchmarks.steps import listed_cases
from sparse_fcmae.model.flops import PUBLISHED, Part, count, module_macs, parameters
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import one_line
from sparse_fcmae.runtime.options import image_size_of, listed, shown_size
from sparse_fcmae.weights.adapter import entry

COLUMNS: Columns = {
    "model": ("model", ""),
    "part": ("part", ""),
    "image_size": ("pixels", ">"),
    "mask_ratio": ("masked", "g"),
    "parameters_millions": ("M parameters", ".2f"),
    "dense_gmacs": ("G dense", ".2f"),
    "published_gmacs": ("published", "g"),
    "deviation": ("deviation", ".2%"),
    "encoder_gmacs": ("G encoder dense", ".2f"),
    "sparse_encoder_gmacs": ("sparse", ".2f"),
    "sparse_over_dense": ("of dense", ".3f"),
    "decoder_gmacs": ("G decoder", ".2f"),
}


@benchmark("gflops", GflopsConfig, COLUMNS, shows=lambda config, row: config.stages or row["part"] == "whole")
def gflops(config: GflopsConfig, device: torch.device) -> Iterator[list[Row]]:
    """Prints and returns a row for each model, image size and mask ratio, and one for each part of it.

    Figures are multiply-accumulates of one image's forward pass, in units of 1e9.
    """
    others = [timm_row(model) for model in listed("compare", config.compare, str)] if config.compare else []
    yield [row for case in listed_cases(config) for row in rows_of(*case)] + others


def rows_of(model: str, size: tuple[int, int], ratio: float) -> list[Row]:
    """The whole of a model, then its parts."""
    parts = count(model, image_size=size, mask_ratio=ratio)
    place = {"model": model, "image_size": shown_size(size), "mask_ratio": ratio}
    whole, encoder = parts.pop("classifier"), parts.pop("encoder")
    row = place | {"part": "whole", "parameters_millions": round(whole.parameters / 1e6, 2)}
    row |= macs("dense", whole.dense) | sparse_figures(encoder)
    row["decoder_gmacs"] = macs("decoder", parts["decoder"].dense)["decoder_gmacs"]
    published = PUBLISHED[model].get(size[0]) if size[0] == size[1] else None
    if published:
        row |= {"published_gmacs": published, "deviation": whole.dense / 1e9 / published - 1}
    rows = [row]
    for name, part in parts.items():
        kinds = {"decoder": "decoder", "head": "dense"}
        figures = macs(kinds[name], part.dense) if name in kinds else sparse_figures(part)
        rows.append(place | {"part": name, "parameters_millions": part.parameters / 1e6} | figures)
    return rows


def macs(kind: str, number: float) -> Row:
    """The columns of a number of multiply-accumulates: exact, and in the units that are published."""
    return {f"{kind}_macs": number, f"{kind}_gmacs": round(number / 1e9, 2)}


def sparse_figures(part: Part) -> Row:
    """The columns of a part that can be computed at the visible positions alone."""
    ratio = {"sparse_over_dense": part.sparse / part.dense}
    return macs("encoder", part.dense) | macs("sparse_encoder", part.sparse) | ratio


def timm_row(model: str) -> Row:
    """A model of timm's, as "timm:NAME@PIXELS", or without pixels in the size that it is made for."""
    library, _, rest = model.partition(":")
    name, _, pixels = rest.partition("@")
    if library != "timm" or not name:
        raise UserError(f"`compare` {model}: give timm:NAME@PIXELS, such as timm:mvitv2_huge_cls@512")
    create = entry("timm", "create_model")
    size = {"img_size": image_size_of(pixels)} if pixels else {}
    try:
        with torch.device("meta"):
            try:
                module = create(name, **size)
            except TypeError:  # one that takes any size
                module = create(name)
            height, width = size.get("img_size") or module.default_cfg["input_size"][1:]
            found = module_macs(module, torch.empty(1, 3, height, width))
    except Exception as error:  # whatever timm's models raise for a name or a size
        raise UserError(f"`compare` {model}: {one_line(error)}") from None
    row = {"model": f"timm {name}", "part": "whole", "image_size": shown_size((height, width))}
    return row | {"parameters_millions": round(parameters(module) / 1e6, 2)} | macs("dense", found)
