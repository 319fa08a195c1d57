import pytest
import torch
from helpers import masks, relative_error

from sparse_fcmae.backends.patch_map import PatchMap
from sparse_fcmae.ops import block_dwconv, reference

SIDES = (8, 4, 2, 1)
FORWARD = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT = FORWARD | {torch.float32: 1e-4}


def make(side, channels, mask, dtype=torch.float32, norm=False, device="cpu"):
    visible = PatchMap.of(mask.to(device))
    x = torch.randn(len(visible.row_to_patch), side, side, channels, device=device).to(dtype)
    weight, bias = torch.randn(channels, 1, 7, 7, device=device), torch.randn(channels, device=device)
    norms = [torch.randn(channels, device=device, requires_grad=True) for _ in range(2 * norm)]
    return [t.requires_grad_() for t in (x, weight, bias)] + [visible.patch_to_row, visible.row_to_patch, *norms]


def run(function, inputs, probe):
    out = function(*inputs)
    return out, *torch.autograd.grad((out * probe.to(out.dtype)).sum(), inputs[:3] + inputs[5:])


def run_exactly(inputs, probe):
    return run(
        reference.block_dwconv, [t.detach().double().requires_grad_() if t.requires_grad else t for t in inputs], probe
    )


def compare(inputs, dtype):
    probe = torch.randn_like(inputs[0])
    ours, exact = run(block_dwconv, inputs, probe), run_exactly(inputs, probe)
    assert [t.dtype for t in ours] == [dtype, dtype] + [torch.float32] * (len(ours) - 2)
    for name, a, b in zip(("out", "x", "weight", "bias", "norm_weight", "norm_bias"), ours, exact, strict=False):
        assert a.isfinite().all(), name
        assert relative_error(a, b) < (FORWARD if name == "out" else GRADIENT)[dtype], name


def test_reference_is_the_sum_over_visible_positions():
    side, cols, channels = 2, 3, 1
    mask = torch.tensor([[[0, 1, 0], [0, 0, 1]]], dtype=torch.bool)
    x, weight, bias, patch_to_row, row_to_patch = (t.detach() for t in make(side, channels, mask))
    positions = {}  # (row, column) of each visible position -> its value
    for t, flat in enumerate(row_to_patch.tolist()):
        for r in range(side):
            for c in range(side):
                positions[flat // cols * side + r, flat % cols * side + c] = x[t, r, c, 0]
    expected = [
        bias[0]
        + sum(
            weight[0, 0, r - y + 3, c - z + 3] * v
            for (r, c), v in positions.items()
            if max(abs(r - y), abs(c - z)) <= 3
        )
        for y, z in positions
    ]
    out = reference.block_dwconv(x, weight, bias, patch_to_row, row_to_patch)
    torch.testing.assert_close(out.flatten(), torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(masks(3, 5)))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(side, kind, dtype, norm):
    compare(make(side, 40, masks(3, 5)[kind], dtype, norm), dtype)


@pytest.mark.parametrize("channels", [1, 3, 7, 13, 16, 31, 100, 129])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.usefixtures("poisoned")
def test_odd_widths(side, channels):
    for dtype in (torch.float32, torch.bfloat16):
        for norm in (False, channels > 2):  # of one channel, or two, the norm's gradient is zero
            compare(make(side, channels, masks(4, 4)["ragged"][1:2], dtype, norm), dtype)


def test_no_visible_patch_at_all():
    inputs = make(4, 8, torch.ones(2, 3, 3, dtype=torch.bool), norm=True)
    out, *grads = run(block_dwconv, inputs, torch.zeros(0, 4, 4, 8))
    assert out.shape == (0, 4, 4, 8)
    assert all((g == 0).all() for g in grads)


def test_without_bias_and_non_contiguous():
    x, weight, _, patch_to_row, row_to_patch = make(4, 24, masks(3, 5)["ragged"])
    strided = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    out = block_dwconv(strided, weight.detach(), None, patch_to_row, row_to_patch)
    assert relative_error(out, reference.block_dwconv(x, weight, None, patch_to_row, row_to_patch)) < 1e-5


@pytest.mark.parametrize("side", SIDES)
def test_opcheck(side):
    for dtype, norm in ((torch.float32, True), (torch.bfloat16, False)):
        inputs = make(side, 9, masks(2, 3)["ragged"], dtype, norm)
        torch.library.opcheck(torch.ops.sparse_fcmae.block_dwconv.default, inputs)


def test_threads_change_rounding_at_most():
    inputs, probe = make(8, 40, masks(3, 5)["ragged"], norm=True), torch.randn(1)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(run(block_dwconv, inputs, probe))
    torch.set_num_threads(threads)
    for single, *others in zip(*results, strict=True):
        assert all(relative_error(other, single) < GRADIENT[torch.float32] for other in others)
        assert torch.equal(others[-1], others[-2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_go_where_the_reference_sends_them(value):
    for side in SIDES:
        for norm in (False, True):
            inputs = make(side, 20, masks(3, 5)["ragged"], norm=norm)
            with torch.no_grad():
                inputs[0][len(inputs[0]) // 2, 0, 0, 3] = value
            probe = torch.randn(inputs[0].shape)
            ours, exact = run(block_dwconv, inputs, probe), run_exactly(inputs, probe)
            assert not ours[0].isfinite().all()
            for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
                # the dense reference multiplies masked positions' zeros by NaN in the weight's gradient
                assert i == 2 or torch.equal(a.isfinite(), b.isfinite())


def test_bfloat16_keeps_nan():
    x = torch.full((1, 1, 1, 33), float("nan"), dtype=torch.bfloat16)
    visible = PatchMap.of(torch.zeros(1, 1, 1, dtype=torch.bool))
    assert block_dwconv(x, torch.ones(33, 1, 7, 7), None, visible.patch_to_row, visible.row_to_patch).isnan().all()


def test_autocast():
    inputs = make(4, 40, masks(3, 5)["ragged"])
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = run(block_dwconv, inputs, torch.ones(1))
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)


def test_wrong_arguments():
    x, weight, bias, patch_to_row, row_to_patch = make(4, 8, masks(3, 5)["ragged"])
    wrong = {
        "float32 or bfloat16": (x.double(), weight, bias, patch_to_row, row_to_patch),
        "S one of": (x[:, :3, :3], weight, bias, patch_to_row, row_to_patch),
        "weight must be": (x, weight[:4], bias, patch_to_row, row_to_patch),
        "bias must be": (x, weight, bias[:4], patch_to_row, row_to_patch),
        "patch_to_row must be": (x, weight, bias, patch_to_row.long(), row_to_patch),
        "row_to_patch must be": (x, weight, bias, patch_to_row, row_to_patch[:-1]),
        "are not of one mask": (x, weight, bias, patch_to_row[:1], row_to_patch),
        "of one mask": (x, weight, bias, patch_to_row.flip(0), row_to_patch),
        "not of one": (x, weight, bias, patch_to_row, row_to_patch.flip(0)),
        "not of one ma": (x, weight, bias, patch_to_row.where(patch_to_row > 0, 5), row_to_patch),
        "norm_weight must be": (x, weight, bias, patch_to_row, row_to_patch, bias[:4], bias),
        "go together": (x, weight, bias, patch_to_row, row_to_patch, bias),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            block_dwconv(*arguments)
