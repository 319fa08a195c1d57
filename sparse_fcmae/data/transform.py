"""From one image, as it is, to what a model takes: for code that has images of its own."""

import os
from dataclasses import dataclass

from torch import Tensor

from sparse_fcmae.data.decoders import File
from sparse_fcmae.data.decoders.pages import Page
from sparse_fcmae.data.format import ImageFormat
from sparse_fcmae.data.views import CentreView


@dataclass(frozen=True)
class Transform:
    """The part of an image that a model sees, normalised: float32 [C, H, W].

    view: which part. form: how it is normalised. It can be passed to the processes of a DataLoader.
    """

    view: CentreView
    form: ImageFormat

    def __call__(self, file: File | Tensor, page: int | None = None) -> Tensor:
        """What the model sees of an image: a path, a binary file, an image of Pillow's, an array or a tensor.

        page: the number of one, counted from 0, where the pages of a file are images of their own. Raises OSError for
        an image that the model does not take.
        """
        if isinstance(file, Tensor):
            file = file.numpy(force=True)
        try:
            return self.form.normalise(self.view(file if page is None else Page(file, page))[None])[0]
        except OSError as error:
            name = file if isinstance(file, str | os.PathLike) else f"the {type(file).__name__}"
            raise OSError(f"{name}: {error.strerror or error}") from None
