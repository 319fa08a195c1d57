"""What the models cost, counted: dense and sparse, beside the published figures and other libraries' models."""

from typing import Any

import torch

from sparse_fcmae.benchmarks.results import Columns, Results, Row
from sparse_fcmae.config import GflopsConfig, image_size_of, listed, shown_size
from sparse_fcmae.encoder import SIZES
from sparse_fcmae.errors import UserError
from sparse_fcmae.files import one_line
from sparse_fcmae.flops import PUBLISHED, Part, count, module_macs, parameters
from sparse_fcmae.formats.libraries import entry

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


def gflops(**options: Any) -> list[Row]:
    """Prints and returns a row a model, image size and mask ratio, and one for each part of it; options are those of
    `GflopsConfig`. Multiply-accumulates of one image's forward pass, in units of 1e9."""
    config = GflopsConfig(**options)
    results = Results("gflops", config, COLUMNS, torch.device("cpu"))
    models = listed("model", config.model, str, SIZES)
    sizes = listed("image_size", config.image_size, image_size_of)
    ratios = listed("mask_ratio", config.mask_ratio, float)
    others = [timm_row(model) for model in listed("compare", config.compare, str)] if config.compare else []
    rows = []
    for model in models:
        for size in sizes:
            for ratio in ratios:
                rows += rows_of(model, size, ratio)
    shown = [row for row in rows if config.stages or row["part"] == "whole"]
    results.add(rows + others, shown + others)
    return results.finish()


def rows_of(model: str, size: tuple[int, int], ratio: float) -> list[Row]:
    """The whole of a model, then its parts."""
    parts = count(model, image_size=size, mask_ratio=ratio)
    place = {"model": model, "image_size": shown_size(size), "mask_ratio": ratio}
    whole, encoder = parts.pop("classifier"), parts.pop("encoder")
    row = {
        **{**place, "part": "whole", "parameters_millions": round(whole.parameters / 1e6, 2)},
        **{"dense_macs": whole.dense, "dense_gmacs": giga(whole.dense)},
        **{**sparse_figures(encoder), "decoder_gmacs": giga(parts["decoder"].dense)},
    }
    published = PUBLISHED[model].get(size[0]) if size[0] == size[1] else None
    if published:
        row |= {"published_gmacs": published, "deviation": whole.dense / 1e9 / published - 1}
    rows = [row]
    for name, part in parts.items():
        rows.append(place | {"part": name, "parameters_millions": part.parameters / 1e6})
        if name == "decoder":
            rows[-1] |= {"decoder_macs": part.dense, "decoder_gmacs": giga(part.dense)}
        elif name == "head":
            rows[-1] |= {"dense_macs": part.dense, "dense_gmacs": giga(part.dense)}
        else:
            rows[-1] |= sparse_figures(part)
    return rows


def sparse_figures(part: Part) -> Row:
    return {
        **{"encoder_macs": part.dense, "sparse_encoder_macs": part.sparse},
        **{"encoder_gmacs": giga(part.dense), "sparse_encoder_gmacs": giga(part.sparse)},
        "sparse_over_dense": part.sparse / part.dense,
    }


def giga(macs: float) -> float:
    """As figures are published; the exact number is beside it."""
    return round(macs / 1e9, 2)


def timm_row(model: str) -> Row:
    """A model of timm's, as "timm:NAME@PIXELS", or without pixels at those that it is made for."""
    library, _, rest = model.partition(":")
    name, _, pixels = rest.partition("@")
    if library != "timm" or not name:
        raise UserError(f"--compare {model}: give timm:NAME@PIXELS, such as timm:mvitv2_huge_cls@512")
    create = entry("timm", "create_model")
    try:
        size = {"img_size": image_size_of(pixels)} if pixels else {}
        with torch.device("meta"):
            try:
                module = create(name, **size)
            except TypeError:  # one that takes any size
                module = create(name)
            height, width = size.get("img_size") or module.default_cfg["input_size"][1:]
            found = module_macs(module, torch.empty(1, 3, height, width))
    except UserError:
        raise
    except Exception as error:  # whatever timm's models raise for a name or a size
        raise UserError(f"--compare {model}: {one_line(error)}") from None
    return {
        **{"model": f"timm {name}", "part": "whole", "image_size": shown_size((height, width))},
        **{"parameters_millions": round(parameters(module) / 1e6, 2), "dense_macs": found, "dense_gmacs": giga(found)},
    }
