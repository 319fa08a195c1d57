import pytest
import torch

from sparse_fcmae import create_encoder
from sparse_fcmae.tasks.hints import hints

GREY = torch.randint(256, (2, 8, 8, 1), dtype=torch.uint8)
COLOUR = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("stem_stride", "samples", "expected"),
    [
        (4, COLOUR, []),
        (4, GREY, []),
        (4, GREY.expand(-1, -1, -1, 3), ["the 2 images looked at are grey"]),
        (4, torch.cat([COLOUR, GREY.expand(-1, -1, -1, 3)]), []),
        (1, COLOUR[:0], []),
        (2, COLOUR, ["the trained encoder can't be converted for timm: timm's ConvNeXt V2 has no stem of stride 2"]),
    ],
)
def test_hints(stem_stride, samples, expected):
    encoder = create_encoder("atto", in_chans=samples.shape[-1], stem_stride=stem_stride)
    found = hints(encoder, samples)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))
