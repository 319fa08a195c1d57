"""Layers that are hooked, replaced, wrapped or set otherwise run by their own forward, in every backend."""

import copy
import logging

import pytest
import torch
from helpers import masks, randomise, relative_error
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune
from torch.utils.module_tracker import ModuleTracker

from sparse_fcmae import available_backends, create_classifier, create_encoder, create_fcmae
from sparse_fcmae.backends.layers import is_depthwise, is_linear, is_norm, is_tiling, is_unhooked
from sparse_fcmae.backends.native import NativePatches
from sparse_fcmae.model.convnext import GRN, Block
from sparse_fcmae.runtime import notices

SMALL = "1-2-1-1:8-16-16-24"
USABLE = [name for name, reason in available_backends("cpu").items() if not reason]
MASK = masks(2, 3)["ragged"]
IMAGES = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


def spread(mask, side):
    return mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]


def last(layer, x):
    """A layer that takes its channels last, given [B, C, H, W]."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def block_by_hand(block, x, keep):
    y = last(block.pwconv1, last(block.norm, block.dwconv(x * keep)))
    h = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    response = ((h * keep) ** 2).sum((2, 3), keepdim=True).clamp_min(1e-300) ** 0.5
    scale = response / (response.mean(1, keepdim=True) + 1e-6)
    gamma, beta = (parameter.view(1, -1, 1, 1) for parameter in (block.grn.gamma, block.grn.beta))
    return x + last(block.pwconv2, gamma * h * scale + beta + h)


def encoded_by_hand(encoder, images, mask):
    """Every layer of an encoder called by itself on dense maps, zero where masked: [B, D, rows, cols]."""
    x = images
    for stage, side in enumerate((8, 4, 2, 1)):
        keep = ~spread(mask, side)
        if stage == 0:
            conv, norm = encoder.downsample_layers[0]
            x = last(norm, conv(x * ~spread(mask, x.shape[2] // mask.shape[1])))
        else:
            norm, conv = encoder.downsample_layers[stage]
            x = conv(last(norm, x) * ~spread(mask, 2 * side))
        for block in encoder.stages[stage]:
            x = block_by_hand(block, x, keep)
    return x * keep


def loss_by_hand(model, images, mask):
    """FCMAE's loss, every layer called by itself."""
    x = model.proj(encoded_by_hand(model.encoder, images, mask))
    x = torch.where(spread(mask, 1), model.mask_token, x)
    for block in model.decoder:
        x = block_by_hand(block, x, torch.ones(1))
    prediction = model.pred(x).permute(0, 2, 3, 1)[mask]
    of_patches = images.unflatten(3, (3, 32)).unflatten(2, (2, 32)).permute(0, 2, 4, 3, 5, 1)[mask].flatten(1)
    target = (of_patches - of_patches.mean(1, keepdim=True)) / (of_patches.var(1, keepdim=True) + 1e-6) ** 0.5
    return ((prediction - target) ** 2).mean()


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return super().forward(1.5 * x)


class Adapter(nn.Module):
    """A layer with something beside it, which shows the layer's weight and bias as if they were its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, copy.deepcopy(layer)
        randomise(self.more)

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)

    def forward(self, x):
        return self.layer(x) + 0.3 * self.more(x)


def patched(layer):
    own = layer.forward
    layer.forward = lambda x: own(x).abs()


def replace(name, make):
    """Puts what `make` makes of a layer in its place."""

    def change(model):
        parent = model.get_submodule(name.rpartition(".")[0])
        parent._modules[name.rpartition(".")[2]] = make(model.get_submodule(name))

    return change


def conv_like(layer, kernel, stride=1, padding=0, **options):
    return nn.Conv2d(layer.in_channels, layer.out_channels, kernel, stride, padding, **options)


def touch(name, do):
    return lambda model: do(model.get_submodule(name))


def unbiased(layer):
    layer.bias = None


BLOCK = "stages.1.1"
CHANGES = {
    "subclass": replace(f"{BLOCK}.pwconv2", lambda old: Scaled(64, 16)),
    "instance's forward": touch(f"{BLOCK}.pwconv1", patched),
    "dwconv's forward": touch(f"{BLOCK}.dwconv", patched),
    "hook": touch(f"{BLOCK}.dwconv", lambda layer: layer.register_forward_hook(lambda m, i, out: out.abs())),
    "hook before": touch(f"{BLOCK}.pwconv2", lambda layer: layer.register_forward_pre_hook(lambda m, i: (i[0] * 0.5,))),
    "dilation": touch(f"{BLOCK}.dwconv", lambda layer: layer.__dict__.update(dilation=(2, 2), padding=(6, 6))),
    "padding mode": replace(
        f"{BLOCK}.dwconv", lambda old: conv_like(old, 7, padding=3, groups=16, padding_mode="circular")
    ),
    "smaller dwconv": replace(f"{BLOCK}.dwconv", lambda old: conv_like(old, 5, padding=2, groups=16)),
    "grouped dwconv": replace(f"{BLOCK}.dwconv", lambda old: conv_like(old, 7, padding=3, groups=4)),
    "overlapping stem": replace("downsample_layers.0.0", lambda old: conv_like(old, 7, 4, 3)),
    "overlapping downsampling": replace("downsample_layers.2.1", lambda old: conv_like(old, 3, 2, 1)),
    "stem without bias": touch("downsample_layers.0.0", unbiased),
    "downsampling without bias": touch("downsample_layers.1.1", unbiased),
    "dwconv without bias": touch(f"{BLOCK}.dwconv", unbiased),
    "pwconv1 without bias": touch(f"{BLOCK}.pwconv1", unbiased),
    "pwconv2 without bias": touch(f"{BLOCK}.pwconv2", unbiased),
    "norm without bias": replace(f"{BLOCK}.norm", lambda old: nn.LayerNorm(16, eps=1e-6, bias=False)),
    "norm without parameters": replace(
        f"{BLOCK}.norm", lambda old: nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    ),
    "stem's norm": replace("downsample_layers.0.1", lambda old: nn.LayerNorm(8, eps=1e-6, elementwise_affine=False)),
    "downsampling's norm": replace("downsample_layers.3.0", lambda old: nn.LayerNorm(16, elementwise_affine=False)),
    "no norm": replace(f"{BLOCK}.norm", lambda old: nn.Identity()),
    **{
        f"adapter on {name}": replace(name, Adapter)
        for name in (
            "downsample_layers.0.0",
            "downsample_layers.2.1",
            f"{BLOCK}.dwconv",
            f"{BLOCK}.pwconv1",
            f"{BLOCK}.pwconv2",
        )
    },
    **{
        f"old weight norm on {name}": touch(name, nn.utils.weight_norm)
        for name in ("downsample_layers.0.0", "downsample_layers.2.1", f"{BLOCK}.dwconv", f"{BLOCK}.pwconv2")
    },
    **{
        f"pruned {name}": touch(name, lambda layer: prune.l1_unstructured(layer, "weight", 0.4))
        for name in ("downsample_layers.0.0", "downsample_layers.2.1", f"{BLOCK}.dwconv", f"{BLOCK}.pwconv1")
    },
}
OF_FCMAE = {
    **{
        f"{what} on {name}": change
        for name in ("proj", "pred")
        for what, change in {
            "adapter": replace(name, Adapter),
            "hook": touch(name, lambda layer: layer.register_forward_hook(lambda m, i, out: 1.5 * out)),
            "old weight norm": touch(name, nn.utils.weight_norm),
            "no bias": touch(name, unbiased),
            "pruning": touch(name, lambda layer: prune.l1_unstructured(layer, "weight", 0.4)),
            "own forward": touch(name, patched),
            "larger window": replace(name, lambda old: conv_like(old, 3, padding=1)),
        }.items()
    },
    "adapter on the decoder": replace("decoder.0.dwconv", Adapter),
}


def changed(model, change):
    """A model and its copy in float64, both changed in the same way."""
    both = model, copy.deepcopy(model)
    for each in both:
        torch.manual_seed(0)
        change(each)
    return both[0], both[1].double()


def twice(model, loss):
    """The loss of two steps of gradient descent, the second of which sees what the first one changed."""
    losses = []
    for _ in range(2):
        model.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return losses


def same_gradients(model, other):
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all()
        assert relative_error(parameter.grad, theirs[name].grad) < 1e-4, name


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", USABLE)
def test_a_layer_runs_by_its_own_forward(name, change):
    model = randomise(create_encoder(SMALL, image_size=(64, 96), backend=name))
    plain = model(IMAGES, MASK)
    model, exact = changed(model, CHANGES[change])
    probe = torch.randn(3, 24, 2, 3)
    expected = encoded_by_hand(exact, IMAGES.double(), MASK)
    assert relative_error(model(IMAGES, MASK), expected) < 1e-5
    assert relative_error(plain, expected) > 1e-4 or "weight norm" in change  # which changes nothing at first
    ours = twice(model, lambda: (model(IMAGES, MASK) * probe).sum())
    theirs = twice(exact, lambda: (encoded_by_hand(exact, IMAGES.double(), MASK) * probe).sum())
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-4
    same_gradients(model, exact)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", OF_FCMAE)
@pytest.mark.parametrize("name", [name for name in USABLE if name != "minkowski"])
def test_a_layer_of_the_decoder_runs_by_its_own_forward(name, change):
    model = randomise(create_fcmae(SMALL, image_size=(64, 96), decoder_dim=16, backend=name))
    plain = model(IMAGES, MASK).loss
    model, exact = changed(model, OF_FCMAE[change])
    expected = loss_by_hand(exact, IMAGES.double(), MASK)
    output = model(IMAGES, MASK)
    assert relative_error(output.loss, expected) < 1e-5
    assert relative_error(plain, expected) > 1e-6 or "weight norm" in change
    assert relative_error(model.errors(IMAGES, MASK).mean(), expected) < 1e-5
    with torch.no_grad():
        assert relative_error(output.prediction, model(IMAGES, MASK).prediction) < 1e-5
    twice(model, lambda: model(IMAGES, MASK).loss)
    twice(exact, lambda: loss_by_hand(exact, IMAGES.double(), MASK))
    same_gradients(model, exact)


@pytest.mark.parametrize("name", USABLE)
def test_hooks_on_whole_parts_fire(name):
    """Stem, downsampling, stages, blocks, response norms and the encoder itself are called as modules."""
    model = create_fcmae(SMALL, image_size=(64, 96), decoder_dim=16, backend=name)
    parts = [
        *(f"encoder.{kind}.{i}" for kind in ("downsample_layers", "stages") for i in range(4)),
        *("encoder", "encoder.stages.1.0", "encoder.stages.1.0.grn", "decoder", "decoder.0"),
    ]
    seen = []
    for part in parts:
        model.get_submodule(part).register_forward_hook(lambda *_, part=part: seen.append(part))
    model(IMAGES, MASK)
    assert sorted(seen) == sorted(parts)


@pytest.mark.parametrize("name", USABLE)
def test_a_pruned_response_norm(name):
    model = randomise(create_encoder(SMALL, image_size=(64, 96), backend=name))
    model, exact = changed(model, lambda model: prune.l1_unstructured(model.stages[0][0].grn, "gamma", 0.5))
    for _ in range(2):
        grn = exact.stages[0][0].grn
        grn.gamma = grn.gamma_orig * grn.gamma_mask
        assert relative_error(model(IMAGES, MASK), encoded_by_hand(exact, IMAGES.double(), MASK)) < 1e-5
        for each in (model, exact):
            with torch.no_grad():
                each.stages[0][0].grn.gamma_orig += 0.1


@pytest.mark.parametrize("name", USABLE)
def test_hooks_of_all_modules_fire(name):
    model = create_encoder(SMALL, image_size=(64, 96), backend=name)
    seen, expected = set(), {id(layer) for layer in model.modules() if not isinstance(layer, nn.ModuleList)}
    handle = register_module_forward_hook(lambda layer, *_: seen.add(id(layer)))
    try:
        model(IMAGES, MASK)
        assert seen == expected
    finally:
        handle.remove()


@pytest.mark.parametrize("name", USABLE)
def test_hooks_of_all_modules_change_what_is_computed(name):
    model = randomise(create_encoder(SMALL, image_size=(64, 96), backend=name))
    exact = copy.deepcopy(model).double()
    handle = register_module_forward_pre_hook(
        lambda layer, inputs: (0.5 * inputs[0],) if isinstance(layer, nn.Conv2d) else None
    )
    try:
        assert relative_error(model(IMAGES, MASK), encoded_by_hand(exact, IMAGES.double(), MASK)) < 1e-5
    finally:
        handle.remove()
    assert relative_error(model(IMAGES, MASK), encoded_by_hand(exact, IMAGES.double(), MASK)) < 1e-5


@pytest.mark.skipif("native" not in USABLE, reason="there are no kernels")
def test_a_tracker_of_names_alone_costs_no_kernel(monkeypatch):
    fused, real = [], NativePatches.fused_block
    monkeypatch.setattr(NativePatches, "fused_block", lambda self, *given: (fused.append(1), real(self, *given))[1])
    with ModuleTracker():
        create_encoder(SMALL, image_size=(64, 96), backend="native")(IMAGES, MASK)
    assert len(fused) == 5


@pytest.mark.skipif("native" not in USABLE, reason="there are no kernels")
def test_that_layers_run_one_by_one_is_said_once(caplog):
    notices._say.cache_clear()
    model = create_encoder(SMALL, image_size=(64, 96), backend="native")
    with caplog.at_level(logging.WARNING):
        model(IMAGES, MASK)
        assert not caplog.records
        model.stages[0][0].pwconv1 = Scaled(8, 32)
        for _ in range(2):
            model(IMAGES, MASK)
    assert [record.getMessage() for record in caplog.records] == [
        "sparse-fcmae: a layer (Scaled) is hooked, replaced or set otherwise than in ConvNeXt V2: such layers run "
        "by their own forward, and those around them one by one, which is slower"
    ]


@pytest.mark.parametrize("name", USABLE)
def test_a_layer_that_makes_another_size_is_refused(name):
    for place, kernel in (("stages.0.0.dwconv", 3), ("downsample_layers.0.0", 4), ("downsample_layers.1.1", 2)):
        model = create_encoder(SMALL, image_size=(64, 96), backend=name)
        replace(place, lambda old, kernel=kernel: conv_like(old, kernel, groups=old.groups))(model)
        with pytest.raises(ValueError, match=r"^the Conv2d makes \[\d+, \d+\] positions, not \[\d+, \d+\]$"):
            model(IMAGES, MASK)


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize(
    ("is_one", "layer"),
    [
        (is_depthwise, nn.Conv2d(4, 4, 7, padding=3, groups=4)),
        (is_tiling, nn.Conv2d(2, 3, 2, 2)),
        (is_linear, nn.Linear(2, 2)),
        (is_norm, nn.LayerNorm(2, eps=1e-6)),
        (is_unhooked, GRN(4)),
    ],
)
def test_a_hook_of_any_kind_keeps_kernels_away_until_it_is_removed(is_one, layer, register):
    assert is_one(layer)
    handle = getattr(layer, register)(lambda *_: None)
    assert not is_one(layer)
    handle.remove()
    assert is_one(layer)


def test_layers_of_other_kinds_are_not_plain():
    for is_one in (is_depthwise, is_tiling, is_linear, is_norm):
        assert not is_one(nn.Conv1d(2, 2, 1))
        assert not is_one(nn.Sequential(nn.Linear(2, 2)))
        assert not is_one(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not is_norm(nn.LayerNorm(2, eps=1e-5))
    assert not is_norm(nn.LayerNorm((2, 2), eps=1e-6))
    assert not is_tiling(nn.Conv2d(2, 2, 2, 2), 1)
    assert is_tiling(nn.Conv2d(2, 2, 1), 1)
    assert not is_depthwise(nn.Conv2d(4, 8, 7, padding=3, groups=4))


@pytest.mark.parametrize("name", USABLE)
def test_low_rank_adapters_of_peft(name):
    peft = pytest.importorskip("peft")
    model = randomise(create_fcmae(SMALL, image_size=(64, 96), decoder_dim=16, backend=name))
    targets = r".*(pwconv1|pwconv2|downsample_layers\.0\.0|downsample_layers\.[123]\.1|proj|pred)"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    exact = copy.deepcopy(adapted).double()
    expected = loss_by_hand(exact.base_model.model, IMAGES.double(), MASK)
    loss = adapted(IMAGES, MASK).loss
    assert relative_error(loss, expected) < 1e-5
    loss.backward()
    expected.backward()
    theirs = dict(exact.named_parameters())
    trained = [(key, value) for key, value in adapted.named_parameters() if value.requires_grad]
    assert len(trained) > 20
    for key, value in trained:
        assert relative_error(value.grad, theirs[key].grad) < 1e-4, key
    merged = adapted.merge_and_unload()
    assert relative_error(merged(IMAGES, MASK).loss, expected) < 1e-5


@pytest.mark.parametrize("name", [name for name in USABLE if name != "minkowski"])
def test_layers_of_their_own_under_autocast_and_drop_path(name):
    torch.manual_seed(0)
    model = randomise(create_classifier(SMALL, image_size=(64, 96), num_classes=3, drop_path=0.3, backend=name))
    exact = model(IMAGES)
    for change in ("overlapping stem", "adapter on downsample_layers.2.1", f"adapter on {BLOCK}.dwconv", "no norm"):
        CHANGES[change](model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    assert logits.shape == exact.shape
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert isinstance(model.stages[0][0], Block)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", [change for change in CHANGES if BLOCK in change or "on stages" not in change])
def test_layers_of_their_own_in_blocks_that_are_computed_again(change):
    """Activation checkpointing lets a backward pass read what it kept once."""
    name = "native" if "native" in USABLE else "torch"
    kept = randomise(create_encoder(SMALL, image_size=(64, 96), backend=name))
    again = copy.deepcopy(kept)
    for model in (kept, again):
        torch.manual_seed(0)
        CHANGES[change](model)
    for stage in again.stages:
        for block in stage:
            block.checkpointed = True
    for model in (kept, again):
        model(IMAGES, MASK).square().sum().backward()
    same_gradients(again, kept)


@pytest.mark.parametrize("name", USABLE)
def test_a_block_within_another_module(name):
    class Around(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, patches):
            return self.block(x, patches)

    model = randomise(create_encoder(SMALL, image_size=(64, 96), backend=name))
    expected = model(IMAGES, MASK)
    model.stages[1][1] = Around(model.stages[1][1])
    assert relative_error(model(IMAGES, MASK), expected) < 1e-6
