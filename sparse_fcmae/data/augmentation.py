"""RandAugment: random operations on an image, done by Pillow in the processes that load images.

kornia's RandAugment would not do. It gives a whole batch the same operations, and they are not those of the recipes:
its brightness adds, its solarize weakens with the magnitude, and its enhancements have no sign.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sparse_fcmae.data.format import IMAGENET_MEAN

FILL = tuple(round(value) for value in IMAGENET_MEAN)  # the colour of what moves into the picture


def _move(image: Image.Image, *coefficients: float) -> Image.Image:
    fill = FILL if image.mode == "RGB" else FILL[1]
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=fill)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    fill = FILL if image.mode == "RGB" else FILL[1]
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, m: float) -> Image.Image:
    added = int(110 * m)
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * len(image.getbands()))


def _enhance(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, m: kind(image).enhance(max(0.1, 1 + 0.9 * m))


# name: an operation on an image with a magnitude between 0 and 1, and whether the magnitude gets a random sign
OPERATIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], bool]] = {
    "auto_contrast": (lambda image, m: ImageOps.autocontrast(image), False),
    "equalize": (lambda image, m: ImageOps.equalize(image), False),
    "invert": (lambda image, m: ImageOps.invert(image), False),
    "posterize": (lambda image, m: ImageOps.posterize(image, 4 - int(4 * m)), False),
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
    """Two random operations on an image (Cubuk et al., 2019), as in the published recipes (rand-m9-mstd0.5-inc1).

    magnitude: 0 to 10. Each operation adds a normal number of standard deviation 0.5 to it, and is done with
    probability 0.5. A greater magnitude makes every operation stronger.
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
