import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_fcmae.benchmarks import steps
from sparse_fcmae.model.flops import count, macs, stage_products

CASE = steps.Case("atto", (64, 64), 0.5, 3, False, torch.device("cpu"))


def test_matrix_products_are_those_of_a_step():
    found = {}
    for work in steps.WORKS:
        run = steps.matrix_products(CASE, work)
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
