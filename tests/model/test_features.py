"""The maps of the four stages, beside those of timm and transformers, and how images become what the encoder takes."""

import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import randomise, relative_error
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ConvNextV2Config, ConvNextV2Model

from sparse_fcmae import UserError, create_classifier, create_encoder, load_classifier, load_encoder, load_transform
from sparse_fcmae.backends import BACKENDS
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.model.convnext import size_of
from sparse_fcmae.weights.convert import export_model
from sparse_fcmae.weights.huggingface import HuggingFace
from sparse_fcmae.weights.timm import Timm

USABLE = [name for name in BACKENDS if not BACKENDS[name].unusable(torch.device("cpu"))]


def timms(encoder):
    """timm's backbone with the same weights, in float64, and its parameters under the official names."""
    model = timm.create_model(
        f"convnextv2_{encoder.name}",
        features_only=True,
        in_chans=encoder.in_chans,
        patch_size=encoder.stem_stride,
    ).double()
    to_ours = {
        Timm().rename(key).replace("stem.", "stem_").replace("stages.", "stages_", 1): key
        for key in encoder.state_dict()
    }
    state = Timm().from_official(encoder.state_dict())
    model.load_state_dict(
        {name: state[Timm().rename(key)].reshape(model.state_dict()[name].shape) for name, key in to_ours.items()}
    )
    return model, {to_ours[name]: parameter for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize(
    ("options", "size"), [({}, (96, 64)), ({"in_chans": 2, "stem_stride": 1}, (24, 40)), ({}, (32, 224))]
)
def test_maps_and_every_gradient_are_those_of_timms_backbone(backend, options, size):
    encoder = randomise(create_encoder("atto", backend=backend, **options))
    model, theirs = timms(encoder)
    images = torch.randn(2, encoder.in_chans, *size, requires_grad=True)
    doubled = images.detach().double().requires_grad_()
    maps, expected = encoder.features(images), model(doubled)
    assert encoder.channels == tuple(model.feature_info.channels())
    assert encoder.strides == tuple(x * encoder.stem_stride // 4 for x in (4, 8, 16, 32))
    assert [x.shape[2:] for x in maps] == [(size[0] // s, size[1] // s) for s in encoder.strides]
    for ours, their in zip(maps, expected, strict=True):
        assert relative_error(ours, their) < 1e-5
    probes = [torch.randn(x.shape) for x in maps]
    sum((x * probe).sum() for x, probe in zip(maps, probes, strict=True)).backward()
    sum((x * probe).sum() for x, probe in zip(expected, probes, strict=True)).backward()
    assert relative_error(images.grad, doubled.grad) < 1e-4
    for name, parameter in encoder.named_parameters():
        assert relative_error(parameter.grad, theirs[name].grad.reshape(parameter.shape)) < 1e-4, name


@torch.no_grad()
def test_maps_are_those_of_transformers():
    encoder = randomise(create_encoder("atto"))
    depths, dims = size_of("atto")
    model = ConvNextV2Model(ConvNextV2Config(depths=depths, hidden_sizes=dims)).eval()
    state = {k.removeprefix("convnextv2."): v for k, v in HuggingFace().from_official(encoder.state_dict()).items()}
    lacking, unknown = model.load_state_dict(state, strict=False)
    assert (lacking, unknown) == (["layernorm.weight", "layernorm.bias"], [])
    images = torch.randn(2, 3, 64, 96)
    _, *expected = model(images, output_hidden_states=True).hidden_states
    for ours, theirs in zip(encoder.features(images), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_other_sizes_are_padded_with_zeros_at_the_end(backend):
    encoder = randomise(create_encoder("atto", backend=backend))
    images = torch.randn(2, 3, 70, 33)
    maps = encoder.features(images)
    assert [tuple(x.shape) for x in maps] == [(2, 40, 18, 9), (2, 80, 9, 5), (2, 160, 5, 3), (2, 320, 3, 2)]
    padded = timms(encoder)[0](F.pad(images, (0, 31, 0, 26)).double())
    for ours, theirs in zip(maps, padded, strict=True):
        assert relative_error(ours, theirs[:, :, : ours.shape[2], : ours.shape[3]]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("backend", USABLE)
def test_maps_are_zero_where_masked_and_end_in_what_forward_gives(backend):
    encoder, images = randomise(create_encoder("atto", backend=backend)), torch.randn(2, 3, 64, 96)
    mask = torch.tensor([[[0, 1, 1], [0, 0, 1]], [[1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    maps = encoder.features(images, mask)
    for x in maps:
        side = x.shape[2] // 2
        hidden = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)
        assert (x.permute(0, 2, 3, 1)[hidden] == 0).all()
        assert (x.permute(0, 2, 3, 1)[~hidden] != 0).any(-1).all()
    assert relative_error(maps[-1], encoder(images, mask)) < 1e-6
    with pytest.raises(UserError, match="normalise them"):
        encoder.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"\[B, 3, H, W\]"):
        encoder.features(torch.zeros(3, 64, 64))


def test_loaded_models_prepare_images_and_know_their_classes(tmp_path):
    form = ImageFormat("uint16", (900.0,), (300.0,), channels=(2,))
    model = randomise(create_classifier("atto", num_classes=2, in_chans=1, image_size=64)).eval()
    export_model(model, tmp_path / "ours", ("cell", "none"), form)
    classifier, encoder = load_classifier(tmp_path / "ours"), load_encoder(tmp_path / "ours")
    assert classifier.classes == ("cell", "none")
    pixels = np.random.default_rng(0).integers(0, 4096, (64, 64, 2), dtype=np.uint16)
    np.save(tmp_path / "a.npy", pixels)
    image = classifier.preprocess(tmp_path / "a.npy")
    expected = (torch.from_numpy(pixels[None, None, :, :, 1].astype(np.float32)) - 900) / 300
    assert relative_error(image, expected) < 1e-6
    several = encoder.preprocess([str(tmp_path / "a.npy"), pixels, torch.from_numpy(pixels)])
    assert torch.equal(several, image.expand(3, 1, 64, 64))
    assert encoder.features(several)[0].shape == (3, 40, 16, 16)
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    with pytest.raises(OSError, match=r"b.png: has uint8 values, not uint16"):
        encoder.preprocess(tmp_path / "b.png")
    with pytest.raises(UserError, match="load_encoder"):
        model.preprocess(pixels)


class Files(torch.utils.data.Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(self.paths[index])


def test_the_transform_goes_to_the_processes_of_a_loader(tmp_path):
    export_model(create_encoder("atto", image_size=64), tmp_path / "ours")
    transform = load_transform(tmp_path / "ours")
    images = torch.randint(256, (3, 80, 70, 3), dtype=torch.uint8)
    paths = []
    for number, image in enumerate(images):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image.numpy()).save(paths[-1])
    expected = torch.stack([transform(path) for path in paths])
    loader = DataLoader(Files(paths, pickle.loads(pickle.dumps(transform))), batch_size=3, num_workers=1)
    assert torch.equal(next(iter(loader)), expected)
