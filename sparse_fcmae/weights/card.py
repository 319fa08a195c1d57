"""The model card that lies beside exported weights: README.md, as model hubs show it."""

from collections.abc import Sequence
from dataclasses import replace

from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.weights.adapter import Target
from sparse_fcmae.weights.weights import Weights, patch_size_of

OURS = "<!-- written by sparse-fcmae; take this line out when you edit the card, so that no conversion replaces it -->"
SHOWN = 20  # classes that a card names


def model_card(weights: Weights, target: Target) -> str:
    """What the weights are, how they came about, the images that they take, and how they are loaded."""
    task = "image-classification" if weights.num_classes else "image-feature-extraction"
    kinds = {"multilabel": f"of {weights.num_classes} labels, several to an image", "regression": "of a number"}
    kind = kinds.get(weights.task, f"classifier of {weights.num_classes} classes") if weights.num_classes else "encoder"
    return _card(weights, task, kind, target.usage(weights), target.hub_library)


SEGMENTER_USAGE = (
    'from sparse_fcmae import load_segmenter\n\nmodel = load_segmenter("FOLDER")\n'
    'logits = model(model.backbone.preprocess("image.png"))  # of the image\'s middle'
)


def segmenter_card(weights: Weights, classes: Sequence[str], parameters: int, usage: str = SEGMENTER_USAGE) -> str:
    """The same of a segmentation model, whose encoder has these weights."""
    named = replace(weights, classes=tuple(classes))
    kind = f"with UperNet, segmentation into {len(classes)} classes"
    return _card(named, "image-segmentation", kind, usage, None, parameters)


def _card(
    weights: Weights, task: str, kind: str, usage: str, hub_library: str | None, parameters: int | None = None
) -> str:
    shape, form = weights.architecture, weights.form
    depths, dims = size_of(shape["name"])
    height, width = shape["image_size"]
    patch = patch_size_of(shape)
    named = shape["name"] if ":" not in shape["name"] else "of its own size"
    millions = (parameters or sum(tensor.numel() for tensor in weights.state.values())) / 1e6
    read = ", ".join(map(str, form.channels or ()))
    channels = f" Of a file the channels {read} are read." if read else ""
    seen = "Windows in the image's own resolution are seen." if form.native else "The image is resized."
    lacking = [] if shape["grn"] else ["no response norm (GRN)"]
    lacking += ["a layer scale"] if shape["layer_scale"] else []
    blocks = f" For comparison the blocks have {' and '.join(lacking)}." if lacking else ""
    lines = [
        "---",
        *([f"library_name: {hub_library}"] if hub_library else []),
        f"pipeline_tag: {task}",
        "tags: [convnextv2, fcmae, self-supervised]",
        "---",
        OURS,
        "",
        f"# ConvNeXt V2 {named}, {kind}",
        "",
        f"{millions:.1f} million parameters. Blocks {list(depths)}, channels {list(dims)}.",
        f"The stem's stride is {shape['stem_stride']}.{blocks}",
        "",
        "## How it came about",
        "",
        *(weights.origin or ("This is not recorded in the weights that it was made of.",)),
        "",
        "## Images",
        "",
        f"{height} x {width} pixels, or other multiples of {patch}. Channels: {form.in_chans}, of {form.dtype}.",
        f"{seen}{channels}",
        "Each channel is normalised by its mean and deviation, in the images' own units:",
        "",
        f"- mean {', '.join(f'{value:.6g}' for value in form.mean)}",
        f"- deviation {', '.join(f'{value:.6g}' for value in form.std)}",
        "",
        *(_classes(weights.classes) if weights.classes else []),
        "## How to load it",
        "",
        "```python",
        usage,
        "```",
        "",
        "## Licence",
        "",
        "Whoever publishes these weights says here under which terms, as the images' own terms allow.",
        "",
        "The method is that of ConvNeXt V2 (Woo et al., 2023, arXiv:2301.00808).",
    ]
    return "\n".join(lines) + "\n"


def _classes(classes: tuple[str, ...]) -> list[str]:
    more = f", and {len(classes) - SHOWN} more in the config" if len(classes) > SHOWN else ""
    return ["## Classes", "", ", ".join(classes[:SHOWN]) + more, ""]
