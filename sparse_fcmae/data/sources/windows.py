"""The images of a source as windows: a large image comes as often as windows fit into it side by side."""

from sparse_fcmae.data.decoders.image import OpenImage, Reading
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.parts import Parts
from sparse_fcmae.data.views import check_window


class Windows(Parts):
    """Every image of a source, as often as windows of (height, width) pixels fit into its area, but once at least.

    Which part of its image a window shows is up to the view. All images are opened to find out their sizes; those that
    can't be, or are smaller than a window times `least_scale`, are left out and named. Raises UserError where they are
    more than the fraction `max_bad_images`.
    """

    def __init__(
        self,
        source: ImageSource,
        window: tuple[int, int],
        reading: Reading,
        max_bad_images: float,
        least_scale: float = 1.0,
    ) -> None:
        height, width = window

        def fitting(image: OpenImage) -> int:
            image_width, image_height = image.size
            check_window(image_width, image_height, round(least_scale * height), round(least_scale * width))
            return max(1, image_width * image_height // (height * width))

        super().__init__(source, reading, fitting, max_bad_images)
        self.notes.insert(
            len(source.notes), f"{len(self)} windows of {height}x{width} pixels in {self.readable} images"
        )
