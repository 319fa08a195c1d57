import pytest
import torch
import torch.nn.functional as F
from helpers import dense_encoder, masks, randomise, relative_error

from sparse_fcmae import UserError, create_classifier
from sparse_fcmae.backends import BACKENDS, resolve_backend
from sparse_fcmae.model.convnext import Block, stochastic_depth

USABLE = [name for name in BACKENDS if not BACKENDS[name].unusable(torch.device("cpu"))]


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize("options", [{}, {"in_chans": 1, "stem_stride": 1}])
def test_logits_and_every_gradient_against_the_papers_definition(backend, options):
    model = randomise(create_classifier("atto", num_classes=5, backend=backend, **options))
    patch, labels = model.patch_size, torch.tensor([0, 4, 2])
    images = torch.randn(3, model.in_chans, 2 * patch, 3 * patch, requires_grad=True)
    logits = model(images)
    F.cross_entropy(logits, labels).backward()

    state = {key: value.detach().double().requires_grad_() for key, value in model.state_dict().items()}
    doubled = images.detach().double().requires_grad_()
    features = dense_encoder(state, doubled, masks(2, 3)["none"]).mean((2, 3))
    normed = F.layer_norm(features, features.shape[-1:], state["norm.weight"], state["norm.bias"], 1e-6)
    expected = F.linear(normed, state["head.weight"], state["head.bias"])
    F.cross_entropy(expected, labels).backward()
    assert relative_error(logits, expected) < 1e-5
    assert relative_error(images.grad, doubled.grad) < 1e-4
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, state[name].grad) < 1e-4, name


@pytest.mark.parametrize("backend", USABLE)
def test_drop_path_skips_images_and_scales_the_others(backend):
    block = randomise(Block(40))
    block.drop_path = 0.4
    patches = resolve_backend(backend, "cpu")(torch.zeros(8, 1, 2, dtype=torch.bool), 2)
    x = patches.gather(torch.randn(8, 40, 1, 2)).requires_grad_()
    torch.manual_seed(3)
    out = stochastic_depth(block, block.drop_path, x, patches)
    torch.manual_seed(3)
    passes = torch.rand(8) >= 0.4
    assert 0 < passes.sum() < 8
    out.square().sum().backward()
    found = [x.grad.clone(), *(p.grad.clone() for p in block.parameters())]

    x.grad = None
    block.zero_grad()
    rows = block(x, patches).unflatten(0, (8, -1)) - x.unflatten(0, (8, -1))
    weight = (passes / 0.6).view(8, *[1] * (rows.dim() - 1))
    expected = x + (weight * rows).flatten(0, 1)
    expected.square().sum().backward()
    assert relative_error(out, expected) < 1e-5
    for a, b in zip(found, [x.grad, *(p.grad for p in block.parameters())], strict=True):
        assert relative_error(a, b) < 1e-4


def test_drop_path_of_everything_leaves_gradients_of_zeros():
    block = randomise(Block(40))
    patches = resolve_backend("auto", "cpu")(torch.zeros(1, 1, 1, dtype=torch.bool), 1)
    block.drop_path = 0.9
    x = patches.gather(torch.randn(1, 40, 1, 1)).requires_grad_()
    torch.manual_seed(0)
    assert torch.rand(1) < 0.9
    torch.manual_seed(0)
    out = stochastic_depth(block, block.drop_path, x, patches)
    out.sum().backward()
    assert torch.equal(out, x)
    assert all((p.grad == 0).all() for p in block.parameters())


def test_drop_path_rises_and_is_for_training_alone():
    model = randomise(create_classifier("atto", num_classes=3, drop_path=0.5))
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.5 * i / 11 for i in range(12)])
    images = torch.randn(4, 3, 64, 64)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_new_heads_are_small_and_wrong_values_named():
    model = create_classifier("atto", num_classes=1000)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
    for options in ({"num_classes": 0}, {"drop_path": 1.0}, {"drop_path": -0.1}):
        with pytest.raises(UserError):
            create_classifier("atto", **options)
    with pytest.raises(UserError, match="not a multiple of the 32-pixel patch"):
        model(torch.randn(1, 3, 40, 32))
