import re

import numpy as np
import pytest
import torch
from helpers import randomise

from sparse_fcmae import UserError, create_fcmae
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


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_missing_values_count_neither_in_targets_nor_in_the_loss(norm_pix_loss):
    model = randomise(create_fcmae("atto", image_size=64, in_chans=2, norm_pix_loss=norm_pix_loss)).double()
    images = torch.randn(3, 2, 64, 96, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool).expand(3, 2, 3)
    recorded = torch.rand(3, 2, 64, 96) < 0.7
    recorded[0, :, :32, :32] = False  # a masked patch without any value
    recorded[1, :, :32, :32] = False
    recorded[1, 0, 3, 4] = True  # and one with a single value
    prediction = torch.randn(3, 6, 2048, dtype=torch.float64, requires_grad=True)
    errors = []
    for b, patch in mask.flatten(1).nonzero().tolist():
        row, col = divmod(patch, 3)
        place = (b, slice(None), slice(32 * row, 32 * row + 32), slice(32 * col, 32 * col + 32))
        seen = recorded[place].permute(1, 2, 0).flatten()
        target = images[place].float().permute(1, 2, 0).flatten()[seen]
        if not len(target):
            errors.append(torch.tensor(0.0))
            continue
        if norm_pix_loss:
            variance = target.var() if len(target) > 1 else torch.tensor(0.0)
            target = (target - target.mean()) / (variance + 1e-6).sqrt()
        errors.append((prediction[b, patch].float()[seen] - target).square().mean())
    expected = torch.stack(errors).mean()
    ours = model.loss(images, prediction, mask, recorded)
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(loss, prediction)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients)
    whole = torch.ones_like(recorded)
    torch.testing.assert_close(model.loss(images, prediction, mask, whole), model.loss(images, prediction, mask))
    assert model.loss(images, prediction, mask, torch.zeros_like(recorded)) == 0
