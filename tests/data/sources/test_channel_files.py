import numpy as np
import pytest
import tifffile

from sparse_fcmae import UserError, evaluate, finetune, pretrain
from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders import open_image
from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.sources.opening import open_images
from sparse_fcmae.weights.read import read_weights

TEMPLATES = ("{name}_w1.tif", "{name}_w2.tif")


@pytest.fixture
def fields(tmp_path):
    """Fields of a microscope, two wavelengths each, of which one lacks its second."""
    (tmp_path / "plate" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("A01", "A02", "deep/B01"):
        for wave in (1, 2):
            values = rng.integers(1000 * wave, 1000 * wave + 500, (40, 50)).astype(np.uint16)
            tifffile.imwrite(tmp_path / "plate" / f"{name}_w{wave}.tif", values)
    tifffile.imwrite(tmp_path / "plate" / "A03_w1.tif", np.zeros((40, 50), np.uint16))
    return tmp_path / "plate"


def test_channels_in_the_order_of_the_templates(fields):
    source = open_images(fields, config=SourceConfig(channel_files=TEMPLATES))
    assert [source.name(i) for i in range(len(source))] == ["A01", "A02", "deep/B01"]
    assert source.notes == ["left out, as 1 images lack some of their channels' files: A03"]
    waves = [tifffile.imread(fields / "deep" / f"B01_w{wave}.tif") for wave in (1, 2)]
    with source.open(2) as file:
        image = open_image(file, Reading(2, "uint16"))
        assert (image.size, image.dtype, image.in_chans) == ((50, 40), "uint16", 2)
        assert np.array_equal(image.resized_crop((3, 5, 20, 30), (25, 17)).numpy(), np.stack(waves, -1)[5:30, 3:20])
        file.seek(0)
        second = open_image(file, Reading(1, "uint16", channels=(2,))).resized_crop((0, 0, 50, 40), (40, 50))
        assert np.array_equal(second[..., 0].numpy(), waves[1])
    assert source.fingerprint != open_images(fields, config=SourceConfig(channel_files=TEMPLATES[::-1])).fingerprint


def test_pretraining(fields, tmp_path):
    options = {"image_size": 32, "stem_stride": 1, "batch_size": 3, "epochs": 1, "num_workers": 0}
    pretrain(data=fields, out=tmp_path / "run", channel_files=TEMPLATES, **options)
    assert read_weights(tmp_path / "run").form.mean == pytest.approx((1250, 2250), rel=0.02)
    pretrain(out=tmp_path / "run", resume=True)


def test_classes(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("live", "dead")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                for wave in (1, 2):
                    values = rng.normal(1000 * wave + 900 * label * (wave == 2), 200, (40, 50)).astype(np.uint16)
                    tifffile.imwrite(tmp_path / split / name / f"{number}_w{wave}.tif", values)
    both = {"data": tmp_path, "channel_files": TEMPLATES}
    options = {"image_size": 32, "batch_size": 4, "num_workers": 0, "lr": 1e-3, "dtype": "fp32"}
    pretrain(data=tmp_path / "train", out=tmp_path / "run", channel_files=TEMPLATES, stem_stride=1, epochs=2,
             knn=tmp_path, **options)  # fmt: skip
    more = {"preset": "atto", "epochs": 12, "eval_every": 12, "drop_path": 0.0, "rand_augment": 0.0}
    finetune(**both, init=tmp_path / "run", out=tmp_path / "tuned", **options, **more)
    found = evaluate(**both, init=tmp_path / "tuned")
    assert (found["images"], found["top1"] > 0.9) == (8, True)
    (tmp_path / "loose").mkdir()
    for wave in (1, 2):
        tifffile.imwrite(tmp_path / "loose" / f"x_w{wave}.tif", values)
    with pytest.raises(UserError, match="x lies in no class folder"):
        evaluate(**both | {"data": tmp_path / "loose"}, init=tmp_path / "tuned")


def test_mistakes(fields):
    with pytest.raises(UserError, match=r"`channel_files` w1.tif: it needs \{name\} once"):
        open_images(fields, config=SourceConfig(channel_files=["w1.tif"]))
    with pytest.raises(UserError, match=r"no image has all of the files \{name\}_w1.tif, \{name\}_w3.tif"):
        open_images(fields, config=SourceConfig(channel_files=["{name}_w1.tif", "{name}_w3.tif"]))
    tifffile.imwrite(fields / "A03_w2.tif", np.zeros((30, 50), np.uint16))
    source = open_images(fields, config=SourceConfig(channel_files=TEMPLATES))
    with source.open(2) as file, pytest.raises(OSError, match="has channels of 30x50 pixels and of 40x50"):
        open_image(file, Reading(2, "uint16"))
