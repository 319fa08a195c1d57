import pytest
import torch
from helpers import randomise

from sparse_fcmae import UserError, create_classifier, create_encoder
from sparse_fcmae.weights.adapters import TARGETS
from sparse_fcmae.weights.convert import write
from sparse_fcmae.weights.verify import verify
from sparse_fcmae.weights.weights import Weights


@pytest.fixture(scope="module")
def weights():
    return Weights.of(randomise(create_classifier("atto", num_classes=3, image_size=32)))


@pytest.mark.parametrize(
    ("to", "key"),
    [
        ("official", "stages.2.3.grn.beta"),
        ("mmpretrain", "downsample_layers.0.0.weight"),
        ("huggingface", "head.bias"),
        ("timm", "stages.0.1.dwconv.weight"),
    ],
)
def test_a_conversion_with_one_wrong_tensor_is_refused(tmp_path, monkeypatch, weights, to, key):
    target = TARGETS[to]
    right = target.from_official

    def wrong(state):
        return right({**state, key: state[key] + 1e-2 * torch.randn_like(state[key])})

    monkeypatch.setattr(target, "from_official", wrong)
    write(weights, target, tmp_path)
    with pytest.raises(UserError, match="differ"):
        verify(weights, target, tmp_path)


def test_what_is_right_is_said_to_be(tmp_path):
    weights, target = Weights.of(randomise(create_encoder("atto", image_size=32))), TARGETS["official"]
    write(weights, target, tmp_path)
    lines = verify(weights, target, tmp_path)
    assert lines
    assert all("verified" in line for line in lines)
