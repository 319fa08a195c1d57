"""What surrounds a model: forward mode, transforms of torch.func, autocast, meta and fake tensors, empty batches."""

import copy
import logging

import pytest
import torch
from helpers import dense_encoder, randomise, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, linearize, vmap

from sparse_fcmae import UserError, available_backends, create_classifier, create_encoder, create_fcmae, ops
from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.runtime import notices

SMALL = "1-1-1-1:8-16-16-24"
USABLE = [name for name, reason in available_backends("cpu").items() if not reason]
MASK = torch.tensor([[[True, False], [False, True]], [[False, True], [False, False]]])
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TANGENT = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def encoder(name):
    return randomise(create_encoder(SMALL, image_size=64, backend=name)).eval()


def exact(model, images, mask=None):
    """The encoder in float64, written from the paper alone."""
    state = {key: value.detach().double() for key, value in model.state_dict().items()}
    return dense_encoder(state, images, torch.zeros_like(MASK) if mask is None else mask)


def slope(model, mask=None, step=1e-5):
    """The derivative along TANGENT, by central differences in float64."""
    images, tangent = IMAGES.double(), TANGENT.double()
    ahead, behind = (exact(model, images + sign * step * tangent, mask) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
@pytest.mark.parametrize("name", USABLE)
def test_tangents_are_central_differences(name, mask, frozen):
    model = encoder(name).requires_grad_(not frozen)
    expected = slope(model, mask)
    assert expected.norm() > 0.1
    assert relative_error(jvp(lambda x: model(x, mask), (IMAGES,), (TANGENT,))[1], expected) < 1e-5
    with forward_ad.dual_level():
        dual = model(forward_ad.make_dual(IMAGES, TANGENT), mask)
        assert relative_error(forward_ad.unpack_dual(dual).tangent, expected) < 1e-5
    column = jacfwd(lambda scale: model(IMAGES + scale * TANGENT, mask))(torch.tensor(0.0))
    assert relative_error(column, expected) < 1e-5


def test_tangents_of_weights_and_a_linearised_model():
    model = encoder("native").requires_grad_(False)
    weights = dict(model.named_parameters())
    step = {key: torch.randn_like(value) for key, value in weights.items()}
    found = jvp(lambda w: functional_call(model, w, (IMAGES,)), (weights,), (step,))[1]
    moved = []
    for sign in (1e-6, -1e-6):
        other = copy.deepcopy(model).double()
        with torch.no_grad():
            for key, value in other.named_parameters():
                value += sign * step[key]
        moved.append(exact(other, IMAGES.double()))
    assert relative_error(found, (moved[0] - moved[1]) / 2e-6) < 1e-4
    assert relative_error(linearize(model, IMAGES)[1](TANGENT), slope(model)) < 1e-5


@pytest.mark.parametrize("name", USABLE)
def test_gradients_by_torch_func_are_those_of_autograd(name):
    model = encoder(name)
    weights = {key: value.detach() for key, value in model.named_parameters()}
    probe = torch.randn(2, 24, 2, 2)

    def loss(weights, images, probe):
        return (functional_call(model, weights, (images,)) * probe).sum()

    found = grad(loss)(weights, IMAGES, probe)
    (model(IMAGES) * probe).sum().backward()
    for key, value in model.named_parameters():
        assert relative_error(found[key], value.grad) < 1e-4, key
    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, IMAGES[:, None], probe[:, None])
    for key in weights:
        assert relative_error(each[key].sum(0), found[key]) < 1e-4, key
    assert relative_error(vmap(lambda x: model(x[None]))(IMAGES)[:, 0], model(IMAGES)) < 1e-5


def test_the_loss_of_pretraining_has_tangents_and_gradients_too():
    model = randomise(create_fcmae(SMALL, image_size=64, backend="native"))
    weights = {key: value.detach() for key, value in model.named_parameters()}

    def loss(weights):
        return functional_call(model, weights, (IMAGES, MASK)).loss

    found = grad(loss)(weights)
    model(IMAGES, MASK).loss.backward()
    for key, value in model.named_parameters():
        assert relative_error(found[key], value.grad) < 1e-4, key
    along = jvp(loss, (weights,), (found,))[1]
    assert relative_error(along, sum(value.square().sum() for value in found.values())) < 1e-4


def test_that_another_backend_stands_in_is_said_once(caplog):
    notices._say.cache_clear()
    model = encoder("native")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            jvp(model, (IMAGES,), (TANGENT,))
        jvp(model.with_backend("masked"), (IMAGES,), (TANGENT,))
        model(IMAGES)
    assert [record.getMessage() for record in caplog.records] == [
        "sparse-fcmae: using the slower masked backend under torch.func and in forward mode"
    ]


def test_a_compiled_encoder_is_compiled_again_for_tangents():
    model = encoder("native").requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(IMAGES), model(IMAGES)) < 1e-5
    with forward_ad.dual_level():
        dual = compiled(forward_ad.make_dual(IMAGES, TANGENT))
        assert relative_error(forward_ad.unpack_dual(dual).tangent, slope(model)) < 1e-5
    assert relative_error(compiled(IMAGES), model(IMAGES)) < 1e-5


def every_op():
    """Each op, called with tensors that it takes, the first of them as given."""
    patches = PatchMap.of(torch.zeros(1, 2, 2, dtype=torch.bool))
    maps, offsets = (patches.patch_to_row, patches.row_to_patch), patches.image_offsets
    row, hidden, pixels = torch.randn(8), torch.randn(32), torch.rand(1, 3, 64, 64)
    block = [
        torch.randn(8, 1, 7, 7),
        row,
        row,
        row,
        torch.randn(32, 8),
        hidden,
        hidden,
        hidden,
        torch.randn(8, 32),
        row,
    ]
    return {
        "block_dwconv": lambda x: ops.block_dwconv(x, block[0], row, *maps),
        "convnext_block": lambda x: ops.convnext_block(x, block, *maps, offsets),
        "gelu_grn": lambda x: ops.gelu_grn(x, row, offsets, row),
        "layer_norm": lambda x: ops.layer_norm(x, row, row, tile=2),
        "linear": lambda x: ops.linear(x, block[4], hidden),
        "patch_embed": lambda x: ops.patch_embed(
            pixels, x[0, :3].view(8, 3, 1, 8)[..., :1], row, row, row, torch.arange(64)
        ),
        "patch_errors": lambda x: ops.patch_errors(x.flatten()[:48].view(1, 48), pixels, patches.row_to_patch[:1]),
    }


@pytest.mark.parametrize("op", every_op())
def test_an_op_refuses_tangents_and_transforms_and_second_derivatives(op):
    run, x = every_op()[op], torch.randn(4, 2, 2, 8) if op != "patch_embed" else torch.randn(1, 3, 8, 8)
    run(x)
    for transform in (
        lambda: jvp(run, (x,), (x,)),
        lambda: vmap(run)(x[None]),
        lambda: grad(lambda x: run(x).sum())(x),
    ):
        with pytest.raises(RuntimeError, match=f"^{op} can't be transformed by torch.func or differentiated forward"):
            transform()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{op} can't be transformed"):
        run(forward_ad.make_dual(x, x))
    x.requires_grad_()
    (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the native kernels are differentiable once: give `backend=masked`"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["masked", "torch"])
def test_second_derivatives_by_the_backends_in_plain_pytorch(name):
    model, scale = encoder(name).requires_grad_(False), torch.tensor(1.0, requires_grad=True)
    (first,) = torch.autograd.grad(model(IMAGES * scale)[0, 0, 0, 0], scale, create_graph=True)
    (second,) = torch.autograd.grad(first, scale)
    step = 1e-3
    values = [exact(model, IMAGES.double() * (1 + sign * step))[0, 0, 0, 0] for sign in (1, 0, -1)]
    expected = (values[0] - 2 * values[1] + values[2]) / step**2
    assert relative_error(second, expected) < 1e-2
    assert relative_error(hessian(lambda s: encoder_at(model, s))(torch.tensor(1.0)), second) < 1e-3


def encoder_at(model, scale):
    return model.with_backend("native")(IMAGES * scale)[0, 0, 0, 0]


@pytest.mark.parametrize("name", ["auto", *USABLE])
def test_shapes_on_the_meta_device(name):
    model, images = create_encoder(SMALL, image_size=64, backend=name).to("meta"), IMAGES.to("meta")
    for inputs in ((images,), (images, MASK.to("meta")), (images, MASK.to("meta"), 2)):
        assert model(*inputs).shape == (2, 24, 2, 2)
        assert model(*inputs).device.type == "meta"
    fcmae = create_fcmae(SMALL, image_size=64, backend=name).to("meta")
    assert fcmae(images).loss.shape == ()
    with pytest.raises(UserError, match="a mask on the meta device does not say what is visible: give `num_visible`"):
        fcmae(images, MASK.to("meta"))


@pytest.mark.parametrize("name", [name for name in USABLE if name != "minkowski"])
def test_shapes_of_fake_tensors(name):
    model = encoder(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images, mask = mode.from_tensor(IMAGES), mode.from_tensor(MASK)
        assert model(images).shape == (2, 24, 2, 2)
        assert model(images, mask, 2).shape == (2, 24, 2, 2)


@pytest.mark.parametrize("name", USABLE)
def test_a_batch_of_no_images_trains(name):
    classifier = create_classifier(SMALL, image_size=64, num_classes=5, drop_path=0.5, backend=name).train()
    logits = classifier(IMAGES[:0])
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in classifier.parameters())
    fcmae = create_fcmae(SMALL, image_size=64, backend=name)
    output = fcmae(IMAGES[:0])
    output.loss.backward()
    assert output.loss == 0
    assert output.prediction.shape == (0, 4, 32 * 32 * 3)


@pytest.mark.parametrize("name", ["auto", *(name for name in USABLE if name != "native")])
def test_float64_stays_float64_under_autocast(name):
    encoder = randomise(create_encoder(SMALL, image_size=64, backend=name)).double()
    fcmae = randomise(create_fcmae(SMALL, image_size=64, backend=name)).double()
    expected = encoder(IMAGES.double(), MASK), fcmae(IMAGES.double(), MASK).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(IMAGES.double(), MASK), fcmae(IMAGES.double(), MASK).loss
    assert found[0].dtype == torch.float64
    assert relative_error(found[0], exact(encoder, IMAGES.double(), MASK)) < 1e-12
    assert relative_error(found[1], expected[1]) < 1e-12
    found[1].backward()
    assert all(parameter.grad.isfinite().all() for parameter in fcmae.parameters())
