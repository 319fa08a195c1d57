import pytest
import torch
from PIL import Image

from sparse_fcmae import UserError
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.evaluation.run import EvaluationView, run_model

VIEW = EvaluationView(
    size=(8, 8),
    form=ImageFormat.imagenet(1),
    reading=Reading(1),
    crop_fraction=1.0,
    device=torch.device("cpu"),
    batch_size=2,
)


def test_outputs_are_those_of_the_readable_images(tmp_path):
    for i in range(5):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("no picture")
    outputs, index, bad = run_model(ImageFolder(tmp_path), lambda images: images.mean((2, 3)), VIEW)
    assert index.tolist() == [0, 1, 2, 4]
    assert [image.name for image in bad] == ["3.png"]
    pixels = (50 * index).to(torch.uint8)[:, None, None, None].expand(4, 8, 8, 1)
    torch.testing.assert_close(outputs, ImageFormat.imagenet(1).normalise(pixels).mean((2, 3)))
    for i in range(5):
        (tmp_path / f"{i}.png").write_text("no picture")
    with pytest.raises(UserError, match=r"no image of .* is readable: 0\.png: no image of a known format"):
        run_model(ImageFolder(tmp_path), lambda images: images, VIEW)
