"""The pages of a source's files as images of their own: slices of a stack, frames, the images of an array."""

from sparse_fcmae.data.decoders.image import Reading
from sparse_fcmae.data.decoders.pages import Page
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.labelled import Labelled
from sparse_fcmae.data.sources.parts import Parts, labelled_parts


class Pages(Parts):
    """Every page of a source's files, in their order. `Parts` says the rest."""

    def __init__(self, source: ImageSource, reading: Reading, max_bad_images: float) -> None:
        super().__init__(source, reading, "pages", lambda image: image.pages, max_bad_images)
        self.describe(f"pages in {self.readable} files, each an image of its own")

    def open(self, index: int) -> Page:
        """A page, with the file that it is in."""
        return Page(super().open(index), self.number(index))

    def name(self, index: int) -> str:
        """The file's name and the page, counted from 1."""
        return f"{super().name(index)} page {self.number(index) + 1}"


def by_page(source: ImageSource, reading: Reading, max_bad_images: float = 1.0) -> ImageSource:
    """The images of a source under a reading: its pages where these are images of their own, or else itself."""
    return Pages(source, reading, max_bad_images) if reading.pages == "images" else source


def labelled_by_page(images: Labelled, reading: Reading, max_bad_images: float = 1.0) -> Labelled:
    """`by_page` of labelled images. A page has the class of its file."""
    if reading.pages != "images":
        return images
    return labelled_parts(images, Pages(images.source, reading, max_bad_images))
