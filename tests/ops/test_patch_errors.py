import numpy as np
import pytest
import torch
from helpers import relative_error
from pixels import DTYPES, make_pixels, make_statistics

from sparse_fcmae.ops import patch_errors, reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FORWARD = {F32: 1e-5, BF16: 1e-5, F16: 1e-5}  # what is summed is float32 whatever the prediction
GRADIENT = {F32: 1e-4, BF16: 1e-2, F16: 2e-3}
ROWS = (0, 2, 7, 8, 11)


def make(pixels, side, dtype=F32):
    values = side * side * pixels.shape[1]
    prediction = torch.randn(len(ROWS), values, device=pixels.device).to(dtype).requires_grad_()
    return prediction, pixels, torch.tensor(ROWS, device=pixels.device)


def run(function, prediction, *others, **options):
    errors = function(prediction, *others, **options)
    probe = torch.linspace(0.5, 2, len(errors), dtype=torch.float64, device=errors.device)
    return errors, *torch.autograd.grad((errors.double() * probe).sum(), prediction)


def compare(prediction, pixels, rows, statistics=None, **options):
    ours = run(patch_errors, prediction, pixels, rows, statistics, **options)
    exact = run(
        reference.patch_errors, prediction.detach().double().requires_grad_(), pixels, rows, statistics, **options
    )
    assert [t.dtype for t in ours] == [F32, prediction.dtype]
    for tolerance, a, b in zip((FORWARD, GRADIENT), ours, exact, strict=True):
        assert a.isfinite().all()
        assert relative_error(a, b) < tolerance[prediction.dtype]


@pytest.mark.parametrize("normalised", [True, False])
def test_reference_is_the_published_loss(normalised):
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64) * 2 + 1
    prediction, _, rows = make(pixels, 32)
    errors = reference.patch_errors(prediction.double(), pixels, rows, normalised=normalised)
    for error, guess, flat in zip(errors, prediction.detach().double().numpy(), ROWS, strict=True):
        image, row, col = flat // 6, flat // 3 % 2 * 32, flat % 3 * 32
        patch = pixels[image, :, row : row + 32, col : col + 32].permute(1, 2, 0).reshape(-1).numpy()
        if normalised:
            patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        assert error.item() == pytest.approx(np.mean((guess - patch) ** 2))


@pytest.mark.parametrize("normalised", [True, False])
def test_reference_leaves_missing_values_out(normalised):
    pixels = make_pixels(F32, 2, 8)
    statistics = make_statistics(pixels)
    prediction, _, rows = make(pixels, 8)
    errors = reference.patch_errors(prediction, pixels, rows, statistics, normalised=normalised)
    assert errors[ROWS.index(7)] == 0
    for error, guess, flat in zip(errors, prediction.detach(), ROWS, strict=True):
        image, row, col = flat // 6, flat // 3 % 2 * 8, flat % 3 * 8
        patch = pixels[image, :, row : row + 8, col : col + 8].permute(1, 2, 0).double()
        target = ((patch - statistics[0]) / statistics[1]).flatten()
        seen = target.isfinite()
        target = target[seen]
        if not len(target):
            continue
        if normalised:
            variance = target.var() if len(target) > 1 else torch.tensor(0.0)
            target = (target - target.mean()) / (variance + 1e-6).sqrt()
        assert error.item() == pytest.approx((guess[seen] - target).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(dtype, normalised, channels_last):
    for channels, side in ((3, 32), (5, 16), (1, 8)):
        pixels = make_pixels(dtype, channels, side, channels_last=channels_last)
        for precision in (F32, BF16):
            compare(*make(pixels, side, precision), make_statistics(pixels), normalised=normalised)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_images_that_are_normalised_already(channels_last):
    pixels = torch.randn(make_pixels(F32, 3, 32).shape)
    if channels_last:
        pixels = pixels.to(memory_format=torch.channels_last)
    for dtype in (F32, BF16):
        compare(*make(pixels, 32, dtype))


def test_a_part_of_wider_images():
    whole = make_pixels(torch.uint8, 4, 32)
    part = whole[:, 1:3, 32:, 16:80]  # neither its rows nor its channels lie side by side
    prediction = torch.randn(2, 2048, requires_grad=True)
    compare(prediction, part, torch.tensor([0, 3]), make_statistics(part))


def test_no_patch_at_all():
    errors = patch_errors(torch.zeros(0, 192, requires_grad=True), torch.zeros(1, 3, 8, 8), torch.zeros(0).long())
    errors.sum().backward()
    assert errors.shape == (0,)


@pytest.mark.parametrize("statistics", [True, False])
def test_opcheck(statistics):
    pixels = make_pixels(torch.uint8 if statistics else F32, 3, 8, missing=False)
    for dtype in (F32, BF16):
        arguments = (*make(pixels, 8, dtype), make_statistics(pixels) if statistics else None, True)
        torch.library.opcheck(torch.ops.sparse_fcmae.patch_errors.default, arguments)


def test_threads_do_not_matter():
    pixels = make_pixels(torch.uint8, 3, 32)
    inputs, threads, results = (*make(pixels, 32), make_statistics(pixels)), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(patch_errors, *inputs))
    torch.set_num_threads(threads)
    for single, *others in zip(*results, strict=True):
        assert all(torch.equal(single, other) for other in others)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_patch_alone(value):
    prediction, pixels, rows = make(torch.randn(2, 3, 16, 24), 8)
    with torch.no_grad():
        prediction[3, 5] = value
    inputs = (prediction.detach().double().requires_grad_(), pixels, rows)
    for a, b in zip(run(patch_errors, prediction, pixels, rows), run(reference.patch_errors, *inputs), strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_wrong_arguments():
    pixels = make_pixels(torch.uint8, 3, 8)
    prediction, _, rows = make(pixels, 8)
    statistics = make_statistics(pixels)
    wrong = {
        "float32 or bfloat16": (prediction.double(), pixels, rows, statistics),
        r"prediction must be \[M, P \* P \* 3\]": (prediction[:, :-3], pixels, rows, statistics),
        "of uint8, uint16, int16, int32, float16, float32": (prediction, pixels.double(), rows, statistics),
        "are not patches of 8x8": (prediction, pixels[:, :, 1:], rows, statistics),
        r"statistics must be float64 \[2, 3\]": (prediction, pixels, rows, statistics[:1]),
        r"rows must be int64 \[N\]": (prediction, pixels, rows.int(), statistics),
        "rows must be patches of the images": (prediction, pixels, rows + 1, statistics),
        "there are 4 rows for 5 predictions": (prediction, pixels, rows[:4], statistics),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            patch_errors(*arguments)
