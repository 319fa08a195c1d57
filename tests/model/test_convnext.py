import pytest
import timm
import torch
from helpers import dense_encoder, masks, randomise, relative_error

from sparse_fcmae import UserError, available_backends, create_encoder, create_fcmae, random_mask
from sparse_fcmae.backends import minkowski
from sparse_fcmae.model.convnext import GIANTS, SIZES, name_of, size_of

MINKOWSKI = available_backends("cpu")["minkowski"] is None
BACKENDS = ("native", "torch", "masked", *["minkowski"] * MINKOWSKI)


def same(a, b, backend):
    """Bit for bit, but for MinkowskiEngine, whose sums on several threads are rounded otherwise at each call."""
    return relative_error(a, b) < 1e-5 if backend == "minkowski" else torch.equal(a, b)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def exact(encoder, images, mask):
    """Features and gradients of the independent dense encoder in float64, for a fixed probe."""
    state = {k: v.detach().double().requires_grad_() for k, v in encoder.named_parameters()}
    features = dense_encoder(state, images.double(), mask, encoder.grn_scope)
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * probe).sum().backward()
    return features, {k: v.grad for k, v in state.items()}, probe


def check(encoder, images, mask):
    features, expected, probe = exact(encoder, images, mask)
    for backend in BACKENDS:
        encoder.backend = backend
        encoder.zero_grad()
        ours = encoder(images, mask)
        (ours * probe).sum().backward()
        assert relative_error(ours, features) < 1e-5, backend
        assert (ours.permute(0, 2, 3, 1)[mask] == 0).all(), backend
        for name, gradient in gradients(encoder).items():
            assert gradient.isfinite().all(), (backend, name)
            assert relative_error(gradient, expected[name]) < 1e-4, (backend, name)


@pytest.mark.parametrize("kind", list(masks(3, 4)))
def test_every_backend_equals_masked_dense_convolution(kind):
    check(randomise(create_encoder("atto")), torch.randn(3, 3, 96, 128), masks(3, 4)[kind])


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 64), {}),
        ((64, 32), {"in_chans": 1}),
        ((64, 96), {"in_chans": 13}),
        ((32, 40), {"stem_stride": 1}),
        ((48, 32), {"stem_stride": 2}),
        ((64, 96), {"grn_scope": "batch"}),
        ((64, 96), {"grn": False}),
        ((96, 64), {"layer_scale": True}),
        ((32, 64), {"grn": False, "layer_scale": True}),
    ],
)
def test_shapes_and_options(size, options):
    encoder = randomise(create_encoder("atto", image_size=size, **options))
    for batch in (1, 3):
        mask = torch.rand(batch, *encoder.grid(*size)) < 0.5
        mask[0, 0, 0], mask[-1, -1, -1] = True, False
        check(encoder, torch.randn(batch, encoder.in_chans, *size), mask)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_the_same_loss_and_gradients_on_all_backends(name):
    model = randomise(create_fcmae(name, image_size=64))
    images = torch.randn(1, 3, 64, 64)
    mask = torch.tensor([[[True, False], [False, True]]])
    losses, reference = {}, None
    for backend in ("masked", *(b for b in BACKENDS if b != "masked")):
        model.encoder.backend = backend
        model.zero_grad()
        output = model(images, mask)
        output.loss.backward()
        losses[backend] = output.loss.item()
        if reference is None:
            reference = [p.grad for p in model.parameters()]
            continue
        for (parameter, p), g in zip(model.named_parameters(), reference, strict=True):
            assert ((p.grad - g).norm() / g.norm().clamp_min(1e-12)).item() < 1e-4, (backend, parameter)
    assert losses == pytest.approx(dict.fromkeys(losses, losses["masked"]), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "timms", "options"),
    [
        ("atto", "convnextv2_atto", {}),
        ("tiny", "convnextv2_tiny", {}),
        ("tiny", "convnext_tiny", {"grn": False, "layer_scale": True}),
    ],
)
def test_without_a_mask_it_is_timms_encoder(name, timms, options):
    encoder = randomise(create_encoder(name, **options))
    model = timm.create_model(timms, num_classes=0).eval()
    state = timm.models.convnext.checkpoint_filter_fn(dict(encoder.state_dict()), model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.startswith("head.") for key in missing)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(encoder(images), model.forward_features(images)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_does_not_feel_the_others(backend):
    encoder = randomise(create_encoder("atto", backend=backend)).eval()
    images, mask = torch.randn(3, 3, 96, 96), masks(3, 3)["ragged"]
    others = images.clone()
    others[1:] = torch.randn(2, 3, 96, 96) * 100
    others[2] = float("nan")
    with torch.no_grad():
        assert same(encoder(others, mask)[0], encoder(images, mask)[0], backend)


@pytest.mark.parametrize("change", ["hook", "epsilon", "replaced", "parametrized"])
def test_layers_that_are_not_as_they_were_made(change):
    encoder = randomise(create_encoder("atto"))
    block, calls = encoder.stages[1][0], []
    if change == "hook":
        block.norm.register_forward_hook(lambda *_: calls.append("norm"))
        encoder.downsample_layers[0][1].register_forward_hook(lambda *_: calls.append("stem"))
    elif change == "epsilon":
        block.norm.eps = encoder.downsample_layers[2][0].eps = 0.1
    elif change == "replaced":
        block.pwconv1 = torch.nn.Sequential(torch.nn.Dropout(0.0), block.pwconv1)
    else:
        torch.nn.utils.parametrizations.weight_norm(block.norm, "weight", dim=None)
        torch.nn.utils.parametrizations.weight_norm(block.dwconv)
    images, mask = torch.randn(2, 3, 64, 96), masks(2, 3)["ragged"][:2]
    features = encoder(images, mask)
    assert calls == (["stem", "norm"] if change == "hook" else [])
    encoder.backend = "torch"
    assert relative_error(features, encoder(images, mask)) < 1e-5


def test_masked_pixels_are_never_read():
    images, mask = torch.randn(2, 3, 96, 96), random_mask(2, (3, 3), 0.5)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    for backend in BACKENDS:
        encoder = randomise(create_encoder("atto", backend=backend))
        features = [encoder(images.masked_fill(hidden, value), mask) for value in (0.0, float("nan"))]
        assert same(*features, backend)


def test_bf16_autocast_is_near_float32():
    encoder, mask = randomise(create_encoder("atto")), random_mask(4, (3, 3), 0.6)
    images = torch.randn(4, 3, 96, 96)
    _, expected, probe = exact(encoder, images, mask)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(images, mask)
    assert features.dtype == torch.float32  # the residual stream
    (features * probe).sum().backward()
    flat = [torch.cat([g[name].flatten().double() for name in expected]) for g in (gradients(encoder), expected)]
    assert relative_error(features, dense_encoder(dict(encoder.state_dict()), images, mask)) < 2e-2
    assert relative_error(*flat) < 3e-2


def test_one_state_dict_in_the_official_layout():
    keys = set(create_encoder("atto").state_dict())
    assert {"downsample_layers.0.0.weight", "downsample_layers.3.1.bias", "stages.2.5.pwconv1.weight"} <= keys
    assert create_encoder("atto").state_dict()["stages.1.0.grn.gamma"].shape == (1, 1, 1, 320)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "enormous"}, "unknown model 'enormous'"),
        ({"name": "1-1-1:8-8-8-8"}, "unknown model '1-1-1:8-8-8-8'"),
        ({"name": "1-1-0-1:8-8-8-8"}, "each stage needs a block and a channel at least"),
        ({"image_size": 100}, "100x100 is not a multiple of the 32-pixel patch"),
        ({"image_size": (64, 0)}, "not a multiple"),
        ({"stem_stride": 3}, "`stem_stride` 3"),
        ({"grn_scope": "pixel"}, "`grn_scope` 'pixel'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"in_chans": 0}, "`in_chans` 0"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(UserError, match=message):
        create_encoder(**{"name": "atto", **arguments})


def test_any_depths_and_widths_have_a_name_that_makes_them():
    assert size_of("1-2-3-1:8-12-20-36") == ((1, 2, 3, 1), (8, 12, 20, 36))
    assert name_of((1, 2, 3, 1), (8, 12, 20, 36)) == "1-2-3-1:8-12-20-36"
    for name, size in (SIZES | GIANTS).items():
        assert (size_of(name), name_of(*size)) == (size, name)
    with torch.device("meta"):
        billions = [sum(p.numel() for p in create_encoder(name).parameters()) / 1e9 for name in GIANTS]
    assert billions == pytest.approx([1.06, 3.12], abs=0.01)


@pytest.mark.parametrize("name", ["1-2-3-1:8-12-20-36", "1-1-1-1:5-9-13-17"])
def test_any_depths_and_widths_are_exact(name):
    encoder = randomise(create_encoder(name, image_size=64, stem_stride=2))
    images, mask = torch.randn(3, 3, 64, 64), masks(4, 4)["ragged"]
    features, expected, probe = exact(encoder, images, mask)
    found = encoder(images, mask)
    (found * probe.float()).sum().backward()
    assert relative_error(found, features) < 1e-5
    assert all(relative_error(gradient, expected[key]) < 1e-4 for key, gradient in gradients(encoder).items())


def test_wrong_inputs():
    encoder = create_encoder("atto")
    with pytest.raises(UserError, match="images must be"):
        encoder(torch.randn(1, 1, 64, 64))
    with pytest.raises(UserError, match="mask must be bool"):
        encoder(torch.randn(1, 3, 64, 64), torch.zeros(1, 2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="mask must be bool"):
        encoder(torch.randn(1, 3, 64, 64), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_number_of_kept_patches_changes_nothing(backend):
    images, mask = torch.randn(2, 3, 64, 96), random_mask(2, (2, 3), 0.5)
    encoder = randomise(create_encoder("atto", backend=backend))
    assert same(encoder(images, mask, num_visible=3), encoder(images, mask), backend)
    assert relative_error(encoder(images), encoder(images, torch.zeros_like(mask))) < 1e-6


def backpropagate(run, encoder, images, mask):
    encoder.zero_grad()
    features = run(images, mask, num_visible=2)
    features.square().sum().backward()
    return features, gradients(encoder)


@pytest.mark.parametrize(("backend", "compiler"), [("native", "inductor"), ("torch", "eager"), ("masked", "eager")])
def test_compiles_whole(backend, compiler):
    images, mask = torch.randn(2, 3, 64, 64), random_mask(2, (2, 2), 0.5)
    encoder = randomise(create_encoder("atto", backend=backend))
    compiled = torch.compile(encoder, fullgraph=True, backend=compiler)
    (plain, expected), (ours, found) = (backpropagate(run, encoder, images, mask) for run in (encoder, compiled))
    assert relative_error(ours, plain) < 1e-5
    assert all(relative_error(found[name], expected[name]) < 1e-4 for name in expected)
    if compiler == "eager":  # as quick to compile again
        other = random_mask(2, (2, 2), 0.25)
        assert relative_error(compiled(images, other, num_visible=3), encoder(images, other)) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch", "masked"])
def test_stored_pixels_without_statistics_are_refused(backend):
    encoder = create_encoder("atto", backend=backend)
    with pytest.raises(UserError, match="images are uint8: normalise them or give `statistics`"):
        encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_available_backends():
    reasons = available_backends("cpu")
    assert reasons["native"] is reasons["torch"] is reasons["masked"] is None
    assert MINKOWSKI or "make minkowski" in reasons["minkowski"]
    assert available_backends("mps")["native"] == "there are no native kernels for mps"


def test_dtypes_without_native_kernels_run_on_the_torch_backend():
    images, mask = torch.randn(1, 3, 64, 64), random_mask(1, (2, 2), 0.5)
    encoder = randomise(create_encoder("atto"))
    expected = encoder(images, mask)
    assert relative_error(encoder.double()(images.double(), mask), expected) < 1e-5
    assert relative_error(encoder.bfloat16()(images.bfloat16(), mask), expected) < 5e-2
    encoder.float().backend = "native"
    with pytest.raises(UserError, match="take float32 or bfloat16"):
        encoder.double()(images.double(), mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_draw_no_random_numbers(backend):
    minkowski._layer.cache_clear()
    encoder, images = create_encoder("atto", backend=backend), torch.randn(1, 3, 32, 32)
    state = torch.get_rng_state()
    encoder(images)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_batch():
    for backend in BACKENDS:
        assert create_encoder("atto", backend=backend)(torch.randn(0, 3, 64, 96)).shape == (0, 320, 2, 3)


def test_another_default_dtype_changes_nothing():
    encoder, images = randomise(create_encoder("atto")), torch.randn(2, 3, 64, 64)
    expected = encoder(images)
    expected.sum().backward()
    before = gradients(encoder)
    encoder.zero_grad()
    torch.set_default_dtype(torch.bfloat16)
    try:
        features = encoder(images)
        features.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(features, expected)
    assert all(torch.equal(g, before[name]) for name, g in gradients(encoder).items())
