"""Which kind of source the option `data` of pretraining names."""

import glob
import os
from collections.abc import Sequence
from typing import Any

from sparse_fcmae.data.config import SourceConfig
from sparse_fcmae.data.decoders.ome_zarr import EXTENSION as ZARR
from sparse_fcmae.data.sources import ImageSource
from sparse_fcmae.data.sources.addresses import Pieces, is_address
from sparse_fcmae.data.sources.channel_files import ChannelFiles
from sparse_fcmae.data.sources.files import ImageFiles
from sparse_fcmae.data.sources.folder import ImageFolder, image_extensions
from sparse_fcmae.data.sources.hugging_face import names_dataset, read_dataset
from sparse_fcmae.data.sources.image_glob import ImageGlob
from sparse_fcmae.data.sources.image_list import ImageList
from sparse_fcmae.data.sources.labelled import Rows
from sparse_fcmae.data.sources.map_style import MapStyleImages
from sparse_fcmae.data.sources.remote_folder import RemoteFolder
from sparse_fcmae.data.sources.several import Several
from sparse_fcmae.data.sources.shards import names_shards, open_shards
from sparse_fcmae.data.sources.table import names_table, read_table
from sparse_fcmae.runtime.errors import UserError

USUAL = SourceConfig()


def open_images(
    data: Any,
    without: str | os.PathLike | None = None,
    config: SourceConfig = USUAL,
) -> ImageSource:
    """The images of a folder, of tar archives, of a table, of a text file with a path a line, or of a pattern.

    Of several such names they are the images of all, one after the other; of a list of images' paths these, in its
    order. Anything else is taken as `MapStyleImages` says. without: a folder whose files are left out. Raises UserError
    where there are no such images.
    """
    if not is_named(data):
        return MapStyleImages(data)
    names = [data] if isinstance(data, str | os.PathLike) else data
    if len(names) > 1 and not config.channel_files and _name_images(names):
        return ImageFiles(f"{len(names)} paths", "", map(os.fspath, names), pieces=Pieces(config.cache_gb))
    parts = [_open(os.fspath(name), without, config) for name in names]
    return parts[0] if len(parts) == 1 else Several(parts)


def is_named(data: Any) -> bool:
    """Whether images are given by a name or names, and not as objects in Python."""
    one = str | os.PathLike
    return isinstance(data, one) or (isinstance(data, list | tuple) and all(isinstance(name, one) for name in data))


def _name_images(names: Sequence[str | os.PathLike]) -> bool:
    """Whether each of these names is an image's path, and no pattern."""
    extensions = image_extensions()
    return all(
        os.path.splitext(name)[1].lower() in extensions and not glob.has_magic(os.fspath(name)) for name in names
    )


def open_rows(data: str | os.PathLike, config: SourceConfig = USUAL) -> Rows | None:
    """What there is to say about each image where `data` is of a kind that says it, as a table does, or else None."""
    if config.channel_files:
        return None
    if names_table(data):
        return read_table(data, config)
    if names_shards(os.fspath(data)):
        return open_shards(os.fspath(data), Pieces(config.cache_gb)).rows()
    if names_dataset(os.fspath(data)):
        return read_dataset(os.fspath(data), config)
    if is_address(os.fspath(data)):
        return RemoteFolder(os.fspath(data), Pieces(config.cache_gb)).rows()
    return None


def _open(data: str, without: str | os.PathLike | None, config: SourceConfig) -> ImageSource:
    """The images of one name."""
    if config.channel_files:
        return ChannelFiles(data, config.channel_files, without)
    if rows := open_rows(data, config):
        return rows.source
    if os.path.isdir(data) and not data.rstrip(os.sep).lower().endswith(ZARR):
        return ImageFolder(data, without)
    if os.path.exists(data):
        data = data.rstrip(os.sep)
        extension = os.path.splitext(data)[1].lower()
        if extension == ".txt":
            return ImageList(data, Pieces(config.cache_gb))
        if extension in image_extensions():
            return ImageFiles(data, os.path.dirname(data), [os.path.basename(data)])
        if data.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise UserError(f"{data}: compressed, so unpack it to a .tar first, say by gunzip")
        known = "no text file with a path a line (.txt), table (.csv, .tsv, .parquet) or archive (.tar)"
        raise UserError(f"{data}: {known}: name the folder that holds the images")
    if glob.has_magic(data):
        return ImageGlob(data, without)
    raise UserError(f"{data}: no such folder or file")
