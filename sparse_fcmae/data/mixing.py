"""Random erasing, MixUp and CutMix of a micro-batch, done by kornia on the model's device."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.runtime.errors import UserError


class Mixing:
    """Normalises images, erases boxes of them, and mixes each with another one and its label.

    form: of the images. random_erasing: the probability that an image gets a box of normal noise. mixup, cutmix: alpha
    of the beta distribution of the fraction that is mixed in, 0 for none. Where both are given, a micro-batch gets one
    of them at random. Random numbers come from torch's global generator. Raises UserError where kornia is needed but
    missing.
    """

    def __init__(self, classes: int, form: ImageFormat, *, random_erasing: float, mixup: float, cutmix: float) -> None:
        self.classes, self.form, self.alpha = classes, form, mixup
        self.erasing = self.mixup = self.cutmix = None
        if not (random_erasing or mixup or cutmix):
            return
        try:
            import kornia.augmentation as K
        except ImportError:
            raise UserError(
                "augmentation needs kornia: pip install kornia (the extra finetune), or give `random_erasing=0` "
                "`mixup=0` `cutmix=0`"
            ) from None
        keys = ["input", "class"]
        if random_erasing:
            self.erasing = K.RandomErasing(p=random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
        if mixup:
            self.mixup = K.RandomMixUpV2(data_keys=keys, same_on_batch=True)
        if cutmix:
            self.cutmix = K.RandomCutMixV2(data_keys=keys, same_on_batch=True, beta=cutmix, use_correct_lambda=True)

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, H, W, C] and labels int64 [B] -> images float32 [B, C, H, W] and targets.

        The targets are the labels, or where images are mixed, the fractions of the classes, float32 [B, classes].
        """
        images = self.form.normalise(pixels)
        if self.erasing is not None:
            untouched = self.erasing(torch.ones_like(images[:, :1])) > 0
            images = torch.where(untouched, images, torch.randn_like(images))
        choices = [mix for mix in (self.mixup, self.cutmix) if mix is not None]
        if not choices:
            return images, labels
        return self._mix(choices[torch.randint(len(choices), ()).item()], images, labels)

    def _mix(self, mix: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parameters = mix.forward_parameters(images.shape)
        if mix is self.mixup:  # kornia draws fractions that are uniform
            fraction = torch.distributions.Beta(self.alpha, self.alpha).sample().item()
            parameters["mixup_lambdas"] = torch.full_like(parameters["mixup_lambdas"], fraction)
        images, mixed = mix(images, labels, params=parameters)
        first, second, weight = mixed.reshape(-1, 3).unbind(1)
        weight = (weight if mix is self.cutmix else 1 - weight)[:, None]  # MixUp's weight is the second label's
        one_hot, other = (F.one_hot(names.long(), self.classes).float() for names in (first, second))
        return images, weight * one_hot + (1 - weight) * other
