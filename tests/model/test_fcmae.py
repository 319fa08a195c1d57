import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import dense_encoder, randomise, relative_error
from torch.utils.flop_counter import FlopCounterMode

from sparse_fcmae import UserError, available_backends, create_fcmae
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.model.fcmae import patchify, unpatchify


def test_output_and_official_keys():
    model = create_fcmae("atto", image_size=(64, 96))
    output = model(torch.randn(2, 3, 64, 96))
    assert output.loss.shape == ()
    assert output.prediction.shape == (2, 6, 32 * 32 * 3)
    assert output.mask.shape == (2, 2, 3)
    assert ((~output.mask).flatten(1).sum(1) == 2).all()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    assert shapes["mask_token"] == (1, 512, 1, 1)
    assert shapes["proj.weight"] == (512, 320, 1, 1)
    assert shapes["decoder.0.dwconv.weight"] == (512, 1, 7, 7)
    assert shapes["decoder.0.grn.gamma"] == (1, 1, 1, 2048)
    assert shapes["pred.weight"] == (3072, 512, 1, 1)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_published_one(norm_pix_loss):
    model = randomise(create_fcmae("atto", image_size=64, norm_pix_loss=norm_pix_loss))
    images = torch.randn(2, 3, 64, 64) * 2 + 1
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    loss, prediction, _ = model(images, mask)
    total, pixels = 0.0, images.double().numpy()
    for b, row, col in mask.nonzero().tolist():
        patch = pixels[b, :, row * 32 : row * 32 + 32, col * 32 : col * 32 + 32].transpose(1, 2, 0).reshape(-1)
        if norm_pix_loss:
            patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        total += np.mean((prediction[b, row * 2 + col].detach().double().numpy() - patch) ** 2)
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("backend", ["native", "torch", "masked"])
def test_a_dense_encoder_sees_zeros_where_a_sparse_one_sees_nothing(backend):
    model = randomise(create_fcmae("atto", image_size=64, sparse=False, backend=backend))
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    statistics = torch.tensor([[120.0, 100.0, 80.0], [50.0, 60.0, 70.0]], dtype=torch.float64)
    mask = torch.tensor([[[True, False, True], [False, True, False]], [[False, True, True], [True, False, True]]])
    pixels = (images - statistics[0][:, None, None]) / statistics[1][:, None, None]
    pixels = pixels * ~mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    state = {key: value.double() for key, value in model.encoder.state_dict().items()}
    features = dense_encoder(state, pixels, torch.zeros_like(mask)) * ~mask[:, None]
    seen = []
    model.proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(images, mask, statistics=statistics).loss.backward()
    assert relative_error(seen[0] * ~mask[:, None], features) < 1e-5
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_patchify_and_back():
    images = torch.randn(2, 5, 16, 24)
    patches = patchify(images, 8)
    assert patches.shape == (2, 6, 320)
    assert torch.equal(patches[1, 4].view(8, 8, 5), images[1, :, 8:16, 8:16].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 8, (2, 3)), images)


def test_masks_follow_the_generator():
    model = create_fcmae("atto", image_size=96)
    images = torch.randn(2, 3, 96, 96)
    first, again, other = (model(images, generator=torch.Generator().manual_seed(s)).mask for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"mask_patch_size": 64}, {"mask_grid": 2}])
def test_coarser_masks(options):
    model = create_fcmae("atto", image_size=128, mask_ratio=0.5, **options)
    mask = model.draw_mask(4, (128, 128))
    assert mask.shape == (4, 4, 4)
    coarse = mask[:, ::2, ::2]
    assert torch.equal(coarse.repeat_interleave(2, 1).repeat_interleave(2, 2), mask)
    assert (coarse.flatten(1).sum(1) == 2).all()


def test_whole_image_hidden_and_whole_image_visible():
    model = randomise(create_fcmae("atto", image_size=64))
    mask = torch.tensor([[[True, True], [True, True]], [[False, False], [False, False]]])
    loss = model(torch.randn(2, 3, 64, 64), mask).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, "keeps no patch"),
        ({"mask_ratio": 0.0}, "masks no patch"),
        ({"mask_patch_size": 48}, "`mask_patch_size` 48 does not tile the 128x128 image in whole patches of 32 pixels"),
        ({"mask_patch_size": 96}, "choose 32 or 64 or 128$"),
        ({"mask_patch_size": 16}, "or give a new model `stem_stride=2`, whose patch has 16 pixels"),
        ({"mask_grid": 3}, "`mask_grid` 3 does not divide"),
        ({"mask_grid": 2, "mask_patch_size": 64}, "exclude each other"),
        ({"decoder_depth": 0}, "`decoder_depth`"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        create_fcmae("atto", image_size=128, **options)


@pytest.mark.parametrize(
    ("options", "suggested"),
    [
        ({"image_size": 48}, 2),
        ({"image_size": (48, 64)}, 2),
        ({"image_size": 24}, 1),
        ({"image_size": 100}, None),
        ({"image_size": 224, "mask_patch_size": 16}, 2),
        ({"image_size": 224, "mask_patch_size": 56}, 1),
        ({"image_size": 224, "mask_patch_size": 64}, None),
        ({"image_size": 128, "mask_patch_size": 96}, None),
        ({"image_size": (64, 48), "mask_patch_size": 16, "stem_stride": 2}, None),
    ],
)
def test_a_stem_stride_is_suggested_only_where_it_is_accepted(options, suggested):
    try:
        create_fcmae("atto", **options)
        refusal = ""
    except UserError as error:
        refusal = str(error)
    assert re.findall(r"`stem_stride=(\d)`", refusal) == ([str(suggested)] if suggested else [])
    if suggested:
        create_fcmae("atto", **options | {"stem_stride": suggested})


@pytest.mark.parametrize("backend", ["native", "torch", "masked"])
@pytest.mark.parametrize("kind", ["uint8", "int32", "float32"])
def test_stored_pixels_are_normalised_where_they_are_read(backend, kind):
    form = ImageFormat(kind, (100.0, 90.0), (40.0, 50.0))
    pixels = torch.randint(256, (2, 64, 96, 2)).to(getattr(torch, kind))
    if kind == "float32":
        pixels[0, :40, :40] = torch.nan
    model = randomise(create_fcmae("atto", image_size=(64, 96), in_chans=2, backend=backend))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool).expand(2, 2, 3)
    statistics, images = form.statistics(torch.device("cpu")), pixels.permute(0, 3, 1, 2)
    output = model(images, mask, statistics=statistics)
    errors = model.errors(images, mask, 2, statistics)
    assert output.loss.item() == pytest.approx(errors.mean().item())
    normalised = model(form.normalise(pixels), mask)
    torch.testing.assert_close(output.prediction, normalised.prediction, rtol=1e-4, atol=1e-5)
    if kind == "float32":  # missing values are no targets
        assert output.loss < normalised.loss
    else:
        torch.testing.assert_close(output.loss, normalised.loss)


def test_errors_are_those_of_the_masked_patches_in_order():
    model = randomise(create_fcmae("atto", image_size=64))
    images = torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    errors = model.errors(images, mask)
    assert errors.shape == (3,)
    for image, part in ((0, errors[:2]), (1, errors[2:])):
        alone = model(images[image : image + 1], mask[image : image + 1]).loss
        assert part.mean().item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_prediction_is_made_when_it_is_read():
    model = randomise(create_fcmae("atto", image_size=64))
    images, mask = torch.randn(2, 3, 64, 64), model.draw_mask(2, (64, 64))
    output = model(images, mask)
    with torch.no_grad():
        evaluated = model(images, mask)
    assert not evaluated.prediction.requires_grad
    torch.testing.assert_close(output.prediction, evaluated.prediction)
    assert output.prediction is not None
    (output.prediction * torch.randn_like(evaluated.prediction)).sum().backward()
    assert model.pred.weight.grad.abs().sum() > 0
    assert model.encoder.stages[0][0].dwconv.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, mask)
    assert half.prediction.dtype == torch.bfloat16
    assert relative_error(half.prediction, evaluated.prediction) < 0.03


def test_a_prediction_is_not_of_later_weights():
    model = create_fcmae("atto", image_size=64)
    output = model(torch.randn(2, 3, 64, 64))
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="read `prediction` before the optimiser's step"):
        _ = output.prediction


@pytest.mark.parametrize("backend", ["native", "torch", "masked"])
def test_images_may_have_a_gradient(backend):
    model = randomise(create_fcmae("atto", image_size=64, backend=backend))
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    mask = torch.tensor([[[True, False], [False, True]]])
    model(images, mask).loss.backward()
    direction = torch.randn_like(images)
    with torch.no_grad():
        losses = [model(images + step * direction, mask).loss for step in (-1e-2, 1e-2)]
    slope = (losses[1] - losses[0]).item() / 2e-2
    assert (images.grad * direction).sum().item() == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("backend", ["native", "torch", "masked"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_dispatch_mode_sees_a_step_as_it_is(backend, bf16):
    """Such as torch's counter of operations. Below one, a view does not know what it is a view of."""
    if reason := available_backends("cpu")[backend]:
        pytest.skip(reason)
    model, images = create_fcmae("atto", image_size=64, backend=backend), torch.randn(2, 3, 64, 64)
    found = []
    for mode in (nullcontext(), FlopCounterMode(display=False)):
        model.zero_grad()
        with mode, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(images, generator=torch.Generator().manual_seed(0)).loss
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))
