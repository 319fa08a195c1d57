"""What a user may want to know before hours of training, as what he gave will not do what he may expect."""

import torch
from torch import Tensor

from sparse_fcmae.model.convnext import SparseEncoder
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.examples import SUGGESTED
from sparse_fcmae.weights.weights import architecture_of


def hints(encoder: SparseEncoder, samples: Tensor) -> list[str]:
    """What there is to say about an encoder and some of its images, [N, H, W, C], a line each."""
    lines = []
    for target in SUGGESTED:
        if reason := TARGETS[target].refusal(architecture_of(encoder)):
            lines.append(f"the trained encoder can't be converted for {target}: {reason.split(':')[0]}")
    if (
        samples.dtype == torch.uint8
        and samples.shape[-1] == 3
        and len(samples)
        and bool((samples == samples[..., :1]).all())
    ):
        lines.append(
            f"the {len(samples)} images looked at are grey: read as colour, their loss is lower by what the three "
            "channels have in common; --in-chans 1 reads one channel"
        )
    return lines
