"""Whether an encoder's features collapse while it is trained, measured again and again on the same few images."""

from math import ceil

import torch
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.collapse import channel_distance, expanded_features, rank_me
from sparse_fcmae.evaluation.reconstruction import sample_images
from sparse_fcmae.evaluation.verdict import DISTANCE, OF_BLOCK, RANK
from sparse_fcmae.model.convnext import SparseEncoder

IMAGES, AT_ONCE = 128, 32  # that are looked at, and that are at once in the encoder
MEMORY = 1 << 26  # bytes of images that are kept
LEAST = 32  # images, of fewer of which a rank says nothing
SHARE, COST = 0.015, 2.5  # of a run's time that checks may take, and what an image costs, in images that are trained on


class FeatureCheck:
    """Measures the rank of embeddings and the distance between channels, in at most SHARE of a run's time.

    every: in so many steps once, and in the last. images: that are trained on in the whole run.
    """

    def __init__(self, source: ImageSource, view: CentreView, form: ImageFormat, every: int, bf16: bool) -> None:
        self.form, self.every, self.bf16 = form, every, bf16
        self.pixels = sample_images(source, images_for(source, view), view)

    def of(self, encoder: SparseEncoder) -> dict[str, float]:
        """The measures of an encoder, by the names that evaluations.jsonl has for them."""
        device = next(encoder.parameters()).device
        blocks: dict[str, list[Tensor]] = {}
        embeddings: list[Tensor] = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            for pixels in self.pixels.split(AT_ONCE):
                for name, maps in expanded_features(encoder, self.form.normalise(pixels.to(device))):
                    if name == "output":
                        embeddings.append(maps.float().mean((2, 3)).cpu())
                    else:
                        blocks.setdefault(name, []).append(channel_distance(maps))
        distances = {f"{OF_BLOCK}{name}": torch.cat(found).mean().item() for name, found in blocks.items()}
        return {RANK: rank_me(torch.cat(embeddings)), DISTANCE: min(distances.values()), **distances}


def images_for(source: ImageSource, view: CentreView) -> int:
    """How many images of a source are looked at."""
    return min(IMAGES, len(source), max(1, MEMORY // view.nbytes))


def steps_between_checks(images: int, batch_size: int, steps: int, eval_steps: int) -> int | None:
    """How many steps there are between checks of so many images: a multiple of those between evaluations.

    None where the run is too short for as few as three checks, at its start, once on the way, and at its end, or where
    there are too few images.
    """
    affordable = int(SHARE * steps * batch_size / (COST * images)) if images >= LEAST else 0
    if affordable < 3:
        return None
    return eval_steps * max(1, ceil(steps / eval_steps / (affordable - 1)))
