import numpy as np
import pytest
import torch
from PIL import Image

from sparse_fcmae import create_encoder
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.tasks.hints import hints, losses

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


def test_what_is_lost_of_images_is_said(tmp_path):
    grey = Image.new("L", (8, 8))
    grey.save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no picture")
    assert losses(ImageFolder(tmp_path)) == []
    for name in ("camera1.tif", "camera2.tif"):
        Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16)).save(tmp_path / name)
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "heights.tif")
    grey.save(tmp_path / "stack.tif", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    assert losses(ImageFolder(tmp_path)) == [
        "camera1.tif has more than 8 bits, of which the lower are lost: stretch its values to all 16 bits first",
        "heights.tif has floating-point values, which are stretched image by image",
        "stack.tif has 2 pages, of which the first alone is read: save each in a file of its own",
    ]
