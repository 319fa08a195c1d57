"""Several images that are the channels of one."""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import BinaryIO

import torch
from torch import Tensor

from sparse_fcmae.data.decoders.image import Box, OpenImage, Reading
from sparse_fcmae.data.format import DTYPES


class FilesTogether(io.BytesIO):
    """The bytes of several files in a row, which are decoded as one image. files: each by itself."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        super().__init__(b"".join(contents))
        self.files = [io.BytesIO(content) for content in contents]


class ChannelsTogether(OpenImage):
    """The channels of several images of one size and dtype, one image's after another's."""

    def __init__(
        self, files: Sequence[BinaryIO], reading: Reading, open_image: Callable[[BinaryIO, Reading], OpenImage]
    ) -> None:
        self.parts = [open_image(file, replace(reading, channels=None)) for file in files]
        first, self.reading = self.parts[0], reading
        for part in self.parts[1:]:
            if part.size != first.size:
                width, height = part.size
                raise OSError(f"has channels of {height}x{width} pixels and of {first.size[1]}x{first.size[0]}")
        if len({part.pages for part in self.parts}) > 1:
            raise OSError(f"has channels of {', '.join(str(part.pages) for part in self.parts)} pages")
        self.pages = first.pages
        self.size, self.dtype = first.size, max((part.dtype for part in self.parts), key=DTYPES.index)
        self.in_chans = sum(part.in_chans for part in self.parts)

    def resized_crop(self, box: Box, size: tuple[int, int]) -> Tensor:
        crops = []
        for part in self.parts:
            part.reading = replace(self.reading, in_chans=part.in_chans, channels=None)
            crops.append(part.resized_crop(box, size))
        return torch.from_numpy(self.reading.selected(torch.cat(crops, -1).numpy()))

    def decode_all(self) -> None:
        for part in self.parts:
            part.decode_all()
