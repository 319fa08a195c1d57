"""Which kind of source the option `data` of pretraining names."""

import glob
import os

from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.folder import ImageFolder, image_extensions
from sparse_fcmae.data.sources.image_glob import ImageGlob
from sparse_fcmae.data.sources.image_list import ImageList
from sparse_fcmae.runtime.errors import UserError


def open_images(data: str, without: str | os.PathLike | None = None) -> ImageSource:
    """The images of a folder, of a text file with a path a line, or of the files that match a pattern.

    without: a folder whose files are left out. Raises UserError where there are no such images.
    """
    if os.path.isdir(data):
        return ImageFolder(data, without)
    if os.path.isfile(data):
        extension = os.path.splitext(data)[1].lower()
        if extension == ".txt":
            return ImageList(data)
        what = "is one image" if extension in image_extensions() else "is no text file with a path a line (.txt)"
        raise UserError(f"{data}: {what}: name the folder that holds the images")
    if glob.has_magic(data):
        return ImageGlob(data, without)
    raise UserError(f"{data}: no such folder or file")
