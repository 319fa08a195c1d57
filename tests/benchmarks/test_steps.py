import pytest
import torch
from helpers import relative_error
from torch.utils.flop_counter import FlopCounterMode

from sparse_fcmae.benchmarks import steps
from sparse_fcmae.model.flops import count, macs, stage_products

CASE = steps.Case("atto", (64, 64), 0.5, 3, False, torch.device("cpu"))


@pytest.mark.parametrize("way", [steps.multiplied, steps.convolved])
def test_matrix_products_are_those_of_a_step(way):
    found = {}
    for work in steps.WORKS:
        run = steps.matrix_products(CASE, work, way)
        with FlopCounterMode(display=False) as counter:
            run()
        found[work] = counter.get_total_flops() / 2
    assert found["forward"] == 3 * sum(macs(stage_products("atto", stage), 2) for stage in range(4))
    stem = macs(stage_products("atto", 0)[:1], 2)
    assert found["step"] == 3 * (found["forward"] - stem)
    decoder = count("atto", image_size=(64, 64), mask_ratio=0.5)["decoder"].sparse - 49 * 4 * 512
    assert found["pretrain"] == found["step"] + 3 * 3 * decoder


def test_candidates_share_weights_and_inputs():
    runs = {name: steps.run_of(CASE, "forward", name) for name in ("native", "masked")}
    (ours, *given), (masked, *others) = runs["native"].args, runs["masked"].args
    assert (ours.backend, masked.backend) == ("native", "masked")
    assert next(ours.parameters()) is next(masked.parameters())
    assert all(a is b for a, b in zip(given[:2], others[:2], strict=True))


def test_masking_once_is_what_a_plain_network_computes_of_a_masked_stem():
    """The network is written out in PyTorch, as the shortcut is by those who take it."""
    encoder, (images, mask) = CASE.encoder, CASE.inputs
    keep = (~mask).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    stem, norm = encoder.downsample_layers[0]
    x = norm(stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * keep
    for number, stage in enumerate(encoder.stages):
        if number:
            norm, down = encoder.downsample_layers[number]
            x = down(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        for block in stage:
            y = block.pwconv1(block.norm(block.dwconv(x).permute(0, 2, 3, 1)))
            y = torch.nn.functional.gelu(y)
            norms = y.norm(dim=(1, 2), keepdim=True)
            y = block.grn.gamma * (y * norms / (norms.mean(-1, keepdim=True) + 1e-6)) + block.grn.beta + y
            x = x + block.pwconv2(y).permute(0, 3, 1, 2)
    (found,) = steps.run_of(CASE, "forward", "masked", steps.ONCE)()
    assert relative_error(found, x.masked_fill(mask[:, None], 0)) < 1e-5
    (masked,) = steps.run_of(CASE, "forward", "masked")()
    assert relative_error(found, masked) > 0.1
