"""What a user may want to know before hours of training, as what he gave will not do what he may expect."""

from contextlib import suppress

import numpy as np
from torch import Tensor

from sparse_fcmae.data.decode import open_image
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.examples import SUGGESTED
from sparse_fcmae.weights.weights import architecture_of

PAGED = ("TIFF", "GIF")  # formats whose further pages may be images
LOOKED_AT = 16  # images, spread evenly over a source


def losses(source: ImageSource) -> list[str]:
    """What is lost of images when they are read as one page of 8 bits, as some of a source's show, a line each."""
    found: dict[str, str] = {}
    for index in np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist():
        with suppress(Exception), source.open(index) as file:  # training names what can't be read
            image, name = open_image(file), source.name(index)
            if image.mode.startswith("I"):
                reason = "has more than 8 bits, of which the lower are lost: stretch its values to all 16 bits first"
                found.setdefault("bits", f"{name} {reason}")
            elif image.mode == "F":
                found.setdefault("floats", f"{name} has floating-point values, which are stretched image by image")
            if image.format in PAGED and getattr(image, "n_frames", 1) > 1:
                reason = f"has {image.n_frames} pages, of which the first alone is read: save each in a file of its own"
                found.setdefault("pages", f"{name} {reason}")
    return list(found.values())


def hints(encoder: SparseEncoder, samples: Tensor) -> list[str]:
    """What there is to say about an encoder and some of its images, uint8 [N, H, W, C], a line each."""
    lines = []
    for target in SUGGESTED:
        if reason := TARGETS[target].refusal(architecture_of(encoder)):
            lines.append(f"the trained encoder can't be converted for {target}: {reason.split(':')[0]}")
    if samples.shape[-1] == 3 and len(samples) and bool((samples == samples[..., :1]).all()):
        lines.append(
            f"the {len(samples)} images looked at are grey: read as colour, their loss is lower by what the three "
            "channels have in common; --in-chans 1 reads one channel"
        )
    return lines
