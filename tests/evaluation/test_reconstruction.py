import numpy as np
import torch
from PIL import Image

from sparse_fcmae import create_fcmae
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.sources.folder import ImageFolder
from sparse_fcmae.data.views import CentreView
from sparse_fcmae.evaluation.reconstruction import draw_reconstruction, reconstruct, sample_images
from sparse_fcmae.evaluation.sheet import save_picture


def test_samples_are_spread_over_the_source(tmp_path):
    for i in range(9):
        Image.new("RGB", (8, 8), (20 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "8.png").write_text("no picture")
    folder = ImageFolder(tmp_path)
    samples = sample_images(folder, 3, CentreView((8, 16)))
    assert (samples.shape, samples.dtype) == ((2, 8, 16, 3), torch.uint8)
    assert samples[:, 0, 0, 0].tolist() == [0, 80]
    assert sample_images(folder, 0, CentreView((8, 16))).shape == (0, 8, 16, 3)


def test_picture_shows_what_is_hidden_and_keeps_what_is_not(pictures, tmp_path):
    for in_chans in (3, 1):
        model = create_fcmae("atto", image_size=32, stem_stride=1, in_chans=in_chans)
        samples = sample_images(ImageFolder(pictures), 2, CentreView((32, 32), Reading(in_chans)))
        mask = model.draw_mask(2, (32, 32), generator=torch.Generator().manual_seed(0))
        form = ImageFormat.imagenet(in_chans)
        found = reconstruct(model, form, samples, mask)
        with torch.no_grad():
            images = form.normalise(samples)
            output = model(images, mask)
        assert torch.allclose(found.loss, output.loss, rtol=1e-5)
        save_picture(draw_reconstruction(found, form), tmp_path / "x.png")
        sheet = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
        assert sheet.shape == (18 + 2 * 100, 4 + 4 * 100, 3)
        for row, sample in enumerate(samples.numpy().astype(int)):
            top = 18 + 100 * row
            tiles = (sheet[top : top + 96, left : left + 96][1::3, 1::3] for left in (4, 104, 204, 304))
            original, masked, predicted, filled = tiles
            assert np.abs(original - sample).max() <= 1
            hidden = (masked.reshape(4, 8, 4, 8, 3) == 128).all((1, 3, 4))  # of 4x4 patches
            assert hidden.sum() == 10
            hidden = hidden.repeat(8, 0).repeat(8, 1)
            assert np.array_equal(masked[~hidden], original[~hidden])
            assert np.array_equal(filled[~hidden], original[~hidden])
            assert np.array_equal(filled[hidden], predicted[hidden])
            assert not np.array_equal(filled[hidden], original[hidden])
            patch = found.images[row, :, 8:16, 24:32]  # the second row of patches, and the last of it
            guess = output.prediction[row, 7].view(8, 8, in_chans).permute(2, 0, 1)
            restored = guess * (patch.var() + 1e-6).sqrt() + patch.mean()
            assert torch.allclose(found.predicted[row, :, 8:16, 24:32], restored, atol=1e-5)
