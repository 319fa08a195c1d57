"""The written folders as other libraries use them: backbones, auto classes and pipelines, without a network."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from helpers import relative_error
from PIL import Image
from torch import nn
from torchvision.extension import _has_ops
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, boxes
from transformers import AutoModel, ConvNextV2Backbone, pipeline

from sparse_fcmae import convert, load_classifier

STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture
def model(tmp_path, export_classifier):
    return export_classifier(image_size=64)


@torch.no_grad()
def test_timms_features_only_of_a_folder(tmp_path, model):
    convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, features_only=True)
    assert theirs.feature_info.channels() == list(model.channels)
    assert theirs.feature_info.reduction() == list(model.strides)
    images = torch.randn(2, 3, 64, 96)
    for a, b in zip(theirs(images), model.features(images), strict=True):
        assert relative_error(a, b) < 1e-5


@torch.no_grad()
def test_a_unet_of_segmentation_models(tmp_path, model):
    convert(tmp_path / "ours", tmp_path / "timm", to="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, features_only=True)
    unet = smp.Unet("tu-convnextv2_atto", encoder_weights=None, classes=3).eval()
    unet.encoder.model.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 96)
    for a, b in zip(unet.encoder(images)[-4:], model.features(images), strict=True):
        assert relative_error(a, b) < 1e-5
    assert unet(images).shape == (2, 3, 64, 96)


@torch.no_grad()
def test_transformers_auto_model_and_backbone(tmp_path, model):
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    images = torch.randn(2, 3, 64, 96)
    maps = model.features(images)
    hidden = AutoModel.from_pretrained(tmp_path / "hf").eval()(images, output_hidden_states=True).hidden_states
    backbone = ConvNextV2Backbone.from_pretrained(tmp_path / "hf", out_features=STAGES).eval()
    for ours, state, normed in zip(maps, hidden[1:], backbone(images).feature_maps, strict=True):
        assert relative_error(state, ours) < 1e-5
        expected = F.layer_norm(ours.permute(0, 2, 3, 1), ours.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        assert relative_error(normed, expected) < 1e-5


def test_transformers_pipelines(tmp_path, model):
    convert(tmp_path / "ours", tmp_path / "hf", to="huggingface")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (73, 73, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    found = pipeline("image-classification", model=str(tmp_path / "hf"))(str(tmp_path / "x.png"))
    classifier = load_classifier(tmp_path / "ours")
    with torch.no_grad():
        probabilities = classifier(classifier.preprocess(tmp_path / "x.png")).softmax(1)[0]
    expected = dict(zip(classifier.classes, probabilities.tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in found} == pytest.approx(expected, abs=0.01)
    features = pipeline("image-feature-extraction", model=str(tmp_path / "hf"))(str(tmp_path / "x.png"))
    assert np.array(features).shape == (1, 320, 2, 2)


def test_torchvisions_pyramid_trains_the_encoder(model):
    pyramid = FeaturePyramidNetwork(list(model.channels), 16)
    maps = pyramid(dict(zip(STAGES, model.features(torch.randn(2, 3, 70, 96)), strict=True)))
    assert [tuple(x.shape) for x in maps.values()] == [(2, 16, 18, 24), (2, 16, 9, 12), (2, 16, 5, 6), (2, 16, 3, 3)]
    sum(x.square().mean() for x in maps.values()).backward()
    encoder = [p for name, p in model.named_parameters() if not name.startswith(("norm", "head"))]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder)


class Pyramid(nn.Module):
    """What torchvision's detectors take: a module with `out_channels` that gives maps by name."""

    def __init__(self, encoder, channels):
        super().__init__()
        self.encoder, self.out_channels = encoder, channels
        self.pyramid = FeaturePyramidNetwork(list(encoder.channels), channels)

    def forward(self, images):
        return self.pyramid(dict(zip("0123", self.encoder.features(images), strict=True)))


def suppressed(found, scores, threshold):
    """Non-maximum suppression in plain PyTorch, in place of torchvision's where that is not compiled."""
    kept, order, overlap = [], scores.argsort(descending=True).tolist(), boxes.box_iou(found, found)
    while order:
        kept.append(order.pop(0))
        order = [other for other in order if overlap[kept[-1], other] <= threshold]
    return torch.tensor(kept, dtype=torch.int64)


def test_torchvisions_faster_rcnn(model, monkeypatch):
    if not _has_ops():
        monkeypatch.setattr(boxes, "nms", suppressed)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    detector = FasterRCNN(Pyramid(model, 16), num_classes=3, min_size=80, max_size=96, rpn_anchor_generator=anchors)
    images = [torch.rand(3, 80, 96), torch.rand(3, 96, 70)]
    truth = [{"boxes": torch.tensor([[4.0, 8, 40, 44]]), "labels": torch.tensor([label])} for label in (1, 2)]
    losses = detector(images, truth)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    encoder = [p for name, p in model.named_parameters() if not name.startswith(("norm", "head"))]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder)
    found = detector.eval()(images)
    assert [set(each) for each in found] == [{"boxes", "labels", "scores"}] * 2
