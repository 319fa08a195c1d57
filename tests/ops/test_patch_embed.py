from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from pixels import DTYPES, make_pixels, make_statistics

from sparse_fcmae.ops import patch_embed, reference

MODULE = import_module("sparse_fcmae.kernels.cpu.patch_embed")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FORWARD = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}
GRADIENT = {F32: 1e-4, BF16: 2e-2, F16: 5e-3}
ROWS = (0, 2, 7, 8, 11)


def make(pixels, kernel, outputs=40, dtype=F32):
    weight = torch.randn(outputs, pixels.shape[1], kernel, kernel)
    parameters = [t.to(pixels.device, dtype).requires_grad_() for t in (weight, *torch.randn(3, outputs))]
    return pixels, parameters, torch.tensor(ROWS, device=pixels.device)


def run(function, pixels, parameters, rows, statistics, dtype=F32):
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != F32):
        out = function(pixels, *parameters, rows, statistics)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device)
    return out, *torch.autograd.grad((out.double() * probe).sum(), parameters)


def compare(pixels, parameters, rows, statistics=None, dtype=F32):
    ours = run(patch_embed, pixels, parameters, rows, statistics, dtype)
    exactly = [p.detach().double().requires_grad_() for p in parameters]
    exact = run(reference.patch_embed, pixels, exactly, rows, statistics)
    assert [t.dtype for t in ours] == [parameters[2].dtype, *(p.dtype for p in parameters)]
    loosest = max((parameters[0].dtype, dtype), key=FORWARD.get)
    for name, a, b in zip(("out", "weight", "bias", "norm weight", "norm bias"), ours, exact, strict=True):
        assert a.isfinite().all(), name
        assert relative_error(a, b) < (FORWARD if name == "out" else GRADIENT)[loosest], name


def test_reference_is_a_convolution_of_normalised_images():
    pixels = make_pixels(torch.uint8, 3, 32)
    statistics = make_statistics(pixels)
    _, (weight, bias, scale, shift), rows = make(pixels, 4, dtype=torch.float64)
    images = (pixels.double() - statistics[0, :, None, None]) / statistics[1, :, None, None]
    z = F.conv2d(images, weight, bias, stride=4).permute(0, 2, 3, 1)
    expected = F.layer_norm(z, (40,), scale, shift, eps=1e-6)
    found = reference.patch_embed(pixels, weight, bias, scale, shift, rows, statistics)
    for patch, flat in zip(found, ROWS, strict=True):
        image, row, col = flat // 6, flat // 3 % 2 * 8, flat % 3 * 8
        torch.testing.assert_close(patch, expected[image, row : row + 8, col : col + 8])


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["a chunk a patch", "one chunk"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_values_and_gradients(dtype, channels_last, chunk_bytes, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", chunk_bytes)
    for channels, kernel in ((3, 4), (5, 2), (1, 1)):
        pixels = make_pixels(dtype, channels, 8 * kernel, channels_last=channels_last)
        for precision in (F32, BF16):
            compare(*make(pixels, kernel), make_statistics(pixels), precision)


@pytest.mark.parametrize("outputs", [3, 31, 130])
@pytest.mark.usefixtures("poisoned")
def test_odd_widths_and_images_that_are_normalised_already(outputs):
    for channels_last in (True, False):
        pixels = make_pixels(F32, 3, 32, channels_last=channels_last, missing=False) / 500 - 1
        for dtype in (F32, BF16) if outputs > 3 else (F32,):  # of three channels the norm magnifies what was rounded
            compare(*make(pixels, 4, outputs), dtype=dtype)


def test_parameters_in_bfloat16():
    pixels = make_pixels(torch.uint8, 3, 32)
    compare(*make(pixels, 4, dtype=BF16), make_statistics(pixels))


def test_no_patch_at_all():
    pixels, parameters, _ = make(make_pixels(torch.uint8, 3, 32), 4)
    out, *grads = run(patch_embed, pixels, parameters, torch.zeros(0).long(), make_statistics(pixels))
    assert out.shape == (0, 8, 8, 40)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("statistics", [True, False])
def test_opcheck(statistics):
    pixels = make_pixels(torch.uint8 if statistics else F32, 3, 8, missing=False)
    for dtype in (F32, BF16):
        pixels, parameters, rows = make(pixels, 1)
        arguments = (pixels, *parameters, rows, make_statistics(pixels) if statistics else None, dtype, not statistics)
        torch.library.opcheck(torch.ops.sparse_fcmae.patch_embed.default, arguments)


def test_threads_change_rounding_at_most():
    pixels = make_pixels(torch.uint8, 3, 32)
    inputs, threads, results = (*make(pixels, 4), make_statistics(pixels)), torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(run(patch_embed, *inputs))
    torch.set_num_threads(threads)
    for single, *others in zip(*results, strict=True):
        assert all(relative_error(other, single) < GRADIENT[F32] for other in others)
        assert torch.equal(others[-1], others[-2])


def test_wrong_arguments():
    pixels, (weight, *rest), rows = make(make_pixels(torch.uint8, 3, 32), 4)
    statistics = make_statistics(pixels)
    wrong = {
        "float32 or bfloat16": (pixels, weight.double(), *rest, rows, statistics),
        r"weight must be \[D, C, k, k\]": (pixels, weight[:, :2], *rest, rows, statistics),
        "are not patches of 32x32": (pixels[..., 1:], weight, *rest, rows, statistics),
        r"norm_weight must be \[40\]": (pixels, weight, rest[0], rest[1][:3], rest[2], rows, statistics),
        "rows must be patches of the images": (pixels, weight, *rest, -rows, statistics),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            patch_embed(*arguments)
