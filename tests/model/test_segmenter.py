import pytest
import torch
import torch.nn.functional as F
from helpers import randomise, relative_error

from sparse_fcmae import UserError
from sparse_fcmae.model.segmenter import Segmenter, class_map
from sparse_fcmae.weights.adapters import TARGETS


def theirs(model):
    """transformers' own UperNet on its own ConvNeXt V2, with the weights of ours."""
    from transformers import ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextV2Config(
        depths=[2, 2, 6, 2],
        hidden_sizes=[40, 80, 160, 320],
        out_features=["stage1", "stage2", "stage3", "stage4"],
        layer_norm_eps=1e-6,
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=model.head_channels, num_labels=5, auxiliary_channels=model.head_channels
    )
    other = UperNetForSemanticSegmentation(config)
    layout, state = TARGETS["huggingface"], model.state_dict()
    encoder = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    named = {
        "backbone." + key.removeprefix(layout.prefix): value for key, value in layout.from_official(encoder).items()
    }
    named |= {
        f"backbone.hidden_states_norms.stage{stage + 1}.{part}": state[f"norms.{stage}.{part}"]
        for stage in range(4)
        for part in ("weight", "bias")
    }
    named |= {key: value for key, value in state.items() if "_head." in key}
    other.load_state_dict(named)
    return other


@pytest.mark.parametrize("training", [True, False])
def test_it_is_transformers_upernet(training):
    model = randomise(Segmenter("atto", num_classes=5, head_channels=24)).train(training)
    other = theirs(model).train(training)
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(5, (2, 64, 96))
    labels[0, :7] = 255
    expected = other(images, labels=labels)
    logits, auxiliary = model.both(images)
    assert logits.shape == (2, 5, 64, 96)
    assert relative_error(logits, expected.logits) < 1e-5
    losses = [F.cross_entropy(found, labels, ignore_index=255) for found in (logits, auxiliary)]
    loss = losses[0] + 0.4 * losses[1]
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    loss.backward()
    expected.loss.backward()
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    for name, parameter in others.items():
        if "_head." in name:
            assert relative_error(own[name].grad, parameter.grad) < 1e-3, name
    norm = others["backbone.hidden_states_norms.stage2.weight"].grad
    assert relative_error(own["norms.1.weight"].grad, norm) < 1e-3
    stem = others["backbone.embeddings.patch_embeddings.weight"].grad
    assert relative_error(own["backbone.downsample_layers.0.0.weight"].grad, stem) < 1e-3


def test_images_of_any_size():
    model = Segmenter("atto", num_classes=3, head_channels=8, in_chans=2, stem_stride=2).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 2, 37, 50)).shape == (1, 3, 37, 50)


@pytest.mark.parametrize(("options", "message"), [({"num_classes": 1}, "needs 2"), ({"drop_path": 1.0}, "drop_path")])
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        Segmenter("atto", **{"num_classes": 2, "head_channels": 8} | options)


@pytest.mark.parametrize("size", [(64, 48), (17, 23), (1, 1), (5, 100), (300, 7)])
@pytest.mark.parametrize("band", [1, 7, 1000])
def test_classes_of_pixels_are_those_of_interpolated_logits(size, band):
    logits = torch.randn(6, 16, 12)
    expected = F.interpolate(logits[None].double(), size, mode="bilinear", align_corners=False)[0]
    found = class_map(logits, *size, band=band).long()
    top = expected.max(0).values
    assert ((top - expected.gather(0, found[None])[0]) < 1e-5).all()
