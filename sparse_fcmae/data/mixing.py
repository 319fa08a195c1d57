"""Random erasing, by kornia, MixUp and CutMix of a micro-batch, on the model's device.

kornia's CutMix would not do: its boxes lie inside the images, so that they are larger than those of the recipes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.notices import say_once


class Mixing:
    """Normalises images, erases boxes of them, and mixes each with another one and its label.

    form: of the images. random_erasing: the probability that an image gets a box of normal noise. mixup, cutmix: alpha
    of the beta distribution of an image's share, 0 for none. Where both are given, a micro-batch gets one of them at
    random. All its images get the same share, of themselves and of another one; an image that is alone is not mixed.
    Random numbers come from torch's global generator. Raises UserError where kornia is needed but missing.
    """

    def __init__(self, classes: int, form: ImageFormat, *, random_erasing: float, mixup: float, cutmix: float) -> None:
        self.classes, self.form, self.alpha = classes, form, {_mixup: mixup, _cutmix: cutmix}
        self.ways = [way for way, alpha in self.alpha.items() if alpha]
        self.erasing = None
        if random_erasing:
            try:
                import kornia.augmentation as K
            except ImportError:
                raise UserError(
                    "random erasing needs kornia: pip install kornia (the extra finetune), or give `random_erasing=0`"
                ) from None
            self.erasing = K.RandomErasing(p=random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, H, W, C], and labels int64 [B] or targets float32 [B, K] -> images float32 [B, C, H, W], targets.

        The targets are what was given, or where images are mixed, the mean of two, of labels as float32 [B, classes].
        """
        images = self.form.normalise(pixels)
        if self.erasing is not None:
            untouched = self.erasing(torch.ones_like(images[:, :1])) > 0
            images = torch.where(untouched, images, torch.randn_like(images))
        if not self.ways:
            return images, labels
        if len(images) < 2:
            say_once("a micro-batch of one image has no other one to mix it with: it is not mixed")
            return images, labels
        way = self.ways[torch.randint(len(self.ways), ()).item()]
        share = torch.distributions.Beta(self.alpha[way], self.alpha[way]).sample().item()
        shift = 1 + torch.randint(len(images) - 1, ()).item()  # to another image than itself, for each
        images, share = way(images, images.roll(shift, 0), share)
        own = labels if labels.is_floating_point() else F.one_hot(labels, self.classes).float()
        other = own.roll(shift, 0)
        return images, share * own + (1 - share) * other


def _mixup(images: Tensor, others: Tensor, share: float) -> tuple[Tensor, float]:
    """Sums of two images each, and the first one's share (Zhang et al., 2018)."""
    return torch.lerp(others, images, share), share


def _cutmix(images: Tensor, others: Tensor, share: float) -> tuple[Tensor, float]:
    """Images with a box of another one each, and the share of their own pixels (Yun et al., 2019).

    The box has the image's shape and 1 - share of its area. Its centre is anywhere, and what lies outside is cut off,
    so their own share of pixels may be larger.
    """
    box = []
    for length in images.shape[2:]:
        side, centre = int(length * (1 - share) ** 0.5), torch.randint(length, ()).item()
        box.append(slice(max(0, centre - side // 2), min(length, centre + (side + 1) // 2)))
    rows, columns = box
    mixed = images.clone()
    mixed[:, :, rows, columns] = others[:, :, rows, columns]
    return mixed, 1 - mixed[0, 0, rows, columns].numel() / mixed[0, 0].numel()
