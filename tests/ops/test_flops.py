"""PyTorch's own counter against the counts of `bench gflops`."""

import pytest
import torch
from helpers import masks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_fcmae import available_backends, create_classifier, create_encoder, create_fcmae
from sparse_fcmae.model.flops import count, macs, stage_products
from sparse_fcmae.ops.flops import visible_taps

pytestmark = pytest.mark.skipif(bool(available_backends("cpu")["native"]), reason="there are no kernels")
IMAGES = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["ragged", "borders", "single", "none"])
@pytest.mark.parametrize("name", ["atto", "1-1-1-1:96-100-104-112"])
def test_the_encoder_is_counted_as_bench_gflops_counts_it(name, kind):
    mask = masks(2, 3)[kind]
    encoder = create_encoder(name, image_size=(64, 96), backend="native").requires_grad_(False)
    forward = 2 * len(mask) * count(name, image_size=(64, 96), mask=mask)["encoder"].sparse
    assert counted(lambda: encoder(IMAGES, mask)) == pytest.approx(forward, rel=1e-12)
    encoder.requires_grad_()
    stem = 2 * macs(stage_products(name, 0)[:1], int((~mask).sum()))  # whose images take no gradient
    step = counted(lambda: encoder(IMAGES, mask).sum().backward())
    assert step == pytest.approx(3 * forward - stem, rel=1e-12)


def test_frozen_weights_take_no_gradients():
    encoder = create_encoder("atto", image_size=(64, 96), backend="native")
    encoder.stages.requires_grad_(False)
    mask = masks(2, 3)["ragged"]
    forward = counted(lambda: encoder(IMAGES, mask))
    blocks = forward - sum(2 * macs(stage_products("atto", i)[:1], int((~mask).sum())) for i in range(4))
    stem = 2 * macs(stage_products("atto", 0)[:1], int((~mask).sum()))
    step = counted(lambda: encoder(IMAGES, mask).sum().backward())
    assert step == pytest.approx(3 * forward - stem - blocks, rel=1e-12)


def test_the_layers_one_by_one_are_counted_as_the_block_is():
    mask = masks(2, 3)["ragged"]
    encoder = create_encoder("atto", image_size=(64, 96), backend="native")
    together = counted(lambda: encoder(IMAGES, mask).sum().backward())
    for stage in encoder.stages:
        for block in stage:
            block.pwconv1.register_forward_hook(lambda *_: None)
    assert counted(lambda: encoder(IMAGES, mask).sum().backward()) == together


def test_classifier_and_pretraining_without_taps_beyond_the_border():
    """The counts of `bench gflops` have those where nothing is masked, as published ones do; no kernel reads there."""
    nothing = torch.zeros(3, 2, 3, dtype=torch.bool)
    parts = count("atto", image_size=(64, 96), num_classes=7)
    encoder = count("atto", image_size=(64, 96), mask=nothing)["encoder"].sparse
    classifier = create_classifier("atto", image_size=(64, 96), num_classes=7, backend="native")
    assert counted(lambda: classifier(IMAGES)) == pytest.approx(6 * (encoder + parts["head"].dense), rel=1e-12)
    mask = masks(2, 3)["ragged"]
    sparse = count("atto", image_size=(64, 96), mask=mask)
    beyond = 512 * (49 * 6 - visible_taps(nothing, 1) / 3)
    fcmae = create_fcmae("atto", image_size=(64, 96), backend="native")
    expected = 6 * (sparse["encoder"].sparse + sparse["decoder"].sparse - beyond)
    assert counted(lambda: fcmae(IMAGES, mask)) == pytest.approx(expected, rel=1e-12)


def test_fake_tensors_count_all_taps():
    encoder = create_encoder("atto", image_size=(64, 96), backend="native").requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = mode.from_tensor(IMAGES)
        found = counted(lambda: encoder(images))
    assert found == pytest.approx(6 * count("atto", image_size=(64, 96))["encoder"].dense, rel=1e-12)
