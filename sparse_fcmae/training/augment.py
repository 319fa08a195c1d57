"""Augmentation of a whole micro-batch on its device, by kornia: RandAugment, random erasing, MixUp, CutMix.

All random numbers come from torch's global generator.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.data import standardise
from sparse_fcmae.errors import UserError

ALIKE = 8  # images that get the same operations of RandAugment, though with signs of their own
SHEAR = math.degrees(math.atan(0.3)) / 180  # kornia takes half turns
OPERATIONS = [  # with the ranges of the recipe that the paper follows
    [("auto_contrast", 0, 1)],
    [("equalize", 0, 1)],
    [("invert", 0, 1)],
    [("rotate", -30.0, 30.0)],
    [("posterize", 4.0, 8.0)],
    [("solarize", 0.0, 1.0)],
    [("solarize_add", 0.0, 0.43)],
    [("color", 0.1, 1.9)],
    [("contrast", 0.1, 1.9)],
    [("brightness", 0.1, 1.9)],
    [("sharpness", 0.1, 1.9)],
    [("shear_x", -SHEAR, SHEAR)],
    [("shear_y", -SHEAR, SHEAR)],
    [("translate_x", -0.45, 0.45)],
    [("translate_y", -0.45, 0.45)],
]


class Augmentation:
    """uint8 images and labels -> normalised images and targets.

    rand_augment: magnitude between 0 and 10, 0 for none; two operations an image, the magnitude varied by a normal
    number of standard deviation 0.5. random_erasing: probability of a grey box. mixup, cutmix: alpha of their beta
    distribution, 0 for none; of both, each micro-batch gets one. Raises UserError where kornia is needed but missing.
    """

    def __init__(
        self, classes: int, *, rand_augment: float, random_erasing: float, mixup: float, cutmix: float
    ) -> None:
        self.classes, self.magnitude, self.alpha = classes, rand_augment, mixup
        self.operations = self.erasing = self.mixup = self.cutmix = None
        if not (rand_augment or random_erasing or mixup or cutmix):
            return
        try:
            import kornia.augmentation as K
            from kornia.augmentation.auto import RandAugment
        except ImportError:
            raise UserError(
                "augmentation needs kornia: pip install 'sparse-fcmae[finetune]', or give --rand-augment 0 "
                "--random-erasing 0 --mixup 0 --cutmix 0"
            ) from None
        if rand_augment:
            self.operations = RandAugment(n=2, m=27, policy=OPERATIONS)
        if random_erasing:
            self.erasing = K.RandomErasing(p=random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
        if mixup:
            self.mixup = K.RandomMixUpV2(data_keys=["input", "class"])
        if cutmix:
            self.cutmix = K.RandomCutMixV2(data_keys=["input", "class"], beta=cutmix, use_correct_lambda=True)

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, H, W, C], int64 [B] -> float32 [B, C, H, W], and the labels or shares of the classes [B, K]."""
        images = pixels.permute(0, 3, 1, 2).float()
        if self.operations is not None:
            images = torch.cat([self._operate(part) for part in (images / 255).split(ALIKE)]) * 255
        images = standardise(images)
        if self.erasing is not None:
            images = self.erasing(images)
        mixing = [mix for mix in (self.mixup, self.cutmix) if mix is not None]
        if not mixing:
            return images, labels
        return self._mix(mixing[torch.randint(len(mixing), ()).item()], images, labels)

    def _operate(self, images: Tensor) -> Tensor:
        magnitude = 3 * (self.magnitude + 0.5 * torch.randn(()).item())  # kornia's goes to 30
        self.operations.m = min(max(magnitude, 0.1), 29.9)
        coloured = self.operations(images.expand(-1, 3, -1, -1)).clamp(0, 1)  # some operations want colours
        return coloured[:, : images.shape[1]]

    def _mix(self, mix, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parameters = mix.forward_parameters(images.shape)
        if mix is self.mixup:  # kornia draws uniform shares
            shares = torch.distributions.Beta(self.alpha, self.alpha).sample((len(images),))
            parameters["mixup_lambdas"] = shares.to(parameters["mixup_lambdas"])
        images, mixed = mix(images, labels, params=parameters)
        own, other, share = mixed.reshape(-1, 3).unbind(1)  # the share is the other's in MixUp, the own in CutMix
        share = (share if mix is self.cutmix else 1 - share)[:, None]
        one_hot = [F.one_hot(names.long(), self.classes).float() for names in (own, other)]
        return images, share * one_hot[0] + (1 - share) * one_hot[1]
