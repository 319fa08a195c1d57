"""Augmentation beyond crops and flips: RandAugment an image, by Pillow in the loader's processes; random erasing, MixUp
and CutMix a micro-batch, by kornia on its device.

kornia's RandAugment gives a whole batch the same operations, and other ones than the recipes': its brightness adds, its
solarize weakens with the magnitude, and its enhancements know no sign.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from sparse_fcmae.data import IMAGENET_MEAN, normalise
from sparse_fcmae.errors import UserError

FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)  # what moves into the picture


def _move(image: Image.Image, *coefficients: float) -> Image.Image:
    fill = FILL if image.mode == "RGB" else FILL[1]
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=fill)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    fill = FILL if image.mode == "RGB" else FILL[1]
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


def _solarize_add(image: Image.Image, m: float) -> Image.Image:
    added = int(110 * m)
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * len(image.getbands()))


def _enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, m: kind(image).enhance(max(0.1, 1 + 0.9 * m))


# name: operation on an image, given a magnitude between 0 and 1, and whether that takes a random sign
OPERATIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], bool]] = {
    "auto_contrast": (lambda image, m: ImageOps.autocontrast(image), False),
    "equalize": (lambda image, m: ImageOps.equalize(image), False),
    "invert": (lambda image, m: ImageOps.invert(image), False),
    "posterize": (lambda image, m: ImageOps.posterize(image, max(1, 4 - int(4 * m))), False),
    "solarize": (lambda image, m: ImageOps.solarize(image, 256 - int(256 * m)), False),
    "solarize_add": (_solarize_add, False),
    "color": (_enhance(ImageEnhance.Color), True),
    "contrast": (_enhance(ImageEnhance.Contrast), True),
    "brightness": (_enhance(ImageEnhance.Brightness), True),
    "sharpness": (_enhance(ImageEnhance.Sharpness), True),
    "rotate": (lambda image, m: _rotate(image, 30 * m), True),
    "shear_x": (lambda image, m: _move(image, 1, 0.3 * m, 0, 0, 1, 0), True),
    "shear_y": (lambda image, m: _move(image, 1, 0, 0, 0.3 * m, 1, 0), True),
    "translate_x": (lambda image, m: _move(image, 1, 0, 0.45 * m * image.width, 0, 1, 0), True),
    "translate_y": (lambda image, m: _move(image, 1, 0, 0, 0, 1, 0.45 * m * image.height), True),
}


class RandAugment:
    """Two random operations an image (Cubuk et al., 2019), as the published recipes have it (rand-m9-mstd0.5-inc1).

    magnitude: 0 to 10, to which each operation adds a normal number of standard deviation 0.5. Each happens with
    probability 0.5, and is the stronger the greater its magnitude.
    """

    def __init__(self, magnitude: float) -> None:
        self.magnitude = magnitude

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for name in rng.choice(list(OPERATIONS), 2):
            operation, signed = OPERATIONS[name]
            m = float(np.clip(rng.normal(self.magnitude, 0.5), 0, 10)) / 10
            happens, negative = rng.random(2) < 0.5
            if happens:
                image = operation(image, -m if signed and negative else m)
        return image


class Mixing:
    """uint8 images and labels -> normalised images and targets, with boxes of noise and other images mixed in.

    random_erasing: probability of a box of normal noise. mixup, cutmix: alpha of the beta distribution of the share,
    0 for none; of both, each micro-batch gets one. Random numbers come from torch's global generator. Raises UserError
    where kornia is needed but missing.
    """

    def __init__(self, classes: int, *, random_erasing: float, mixup: float, cutmix: float) -> None:
        self.classes, self.alpha = classes, mixup
        self.erasing = self.mixup = self.cutmix = None
        if not (random_erasing or mixup or cutmix):
            return
        try:
            import kornia.augmentation as K
        except ImportError:
            raise UserError(
                "augmentation needs kornia: pip install kornia (the extra finetune), or give --random-erasing 0 "
                "--mixup 0 --cutmix 0"
            ) from None
        labelled = {"data_keys": ["input", "class"], "same_on_batch": True}
        if random_erasing:
            self.erasing = K.RandomErasing(p=random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
        if mixup:
            self.mixup = K.RandomMixUpV2(**labelled)
        if cutmix:
            self.cutmix = K.RandomCutMixV2(**labelled, beta=cutmix, use_correct_lambda=True)

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, H, W, C], int64 [B] -> float32 [B, C, H, W], and the labels or shares of the classes [B, K]."""
        images = normalise(pixels)
        if self.erasing is not None:
            kept = self.erasing(torch.ones_like(images[:, :1]))
            images = torch.where(kept > 0, images, torch.randn_like(images))
        mixing = [mix for mix in (self.mixup, self.cutmix) if mix is not None]
        if not mixing:
            return images, labels
        return self._mix(mixing[torch.randint(len(mixing), ()).item()], images, labels)

    def _mix(self, mix: Callable, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parameters = mix.forward_parameters(images.shape)
        if mix is self.mixup:  # kornia draws uniform shares
            share = torch.distributions.Beta(self.alpha, self.alpha).sample()
            parameters["mixup_lambdas"] = torch.full_like(parameters["mixup_lambdas"], share.item())
        images, mixed = mix(images, labels, params=parameters)
        own, other, share = mixed.reshape(-1, 3).unbind(1)  # the share is the other's in MixUp, the own in CutMix
        share = (share if mix is self.cutmix else 1 - share)[:, None]
        one_hot = [F.one_hot(names.long(), self.classes).float() for names in (own, other)]
        return images, share * one_hot[0] + (1 - share) * one_hot[1]
