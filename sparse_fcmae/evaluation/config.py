"""The options of `sparse-fcmae evaluate`."""

from dataclasses import dataclass

from sparse_fcmae.data.config import ReadingConfig
from sparse_fcmae.runtime.compute import ComputeConfig
from sparse_fcmae.runtime.options import option, seed_option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ReadingConfig, ComputeConfig):
    """Options of `sparse-fcmae evaluate`."""

    data: str = option(
        help="class folders, or these in val or test (and train, for the probes), a table (.csv, .tsv), archives "
        "(.tar), Parquet files or a saved data set",
        path=True,
    )
    init: str = option(help="weights: run, checkpoint or exported folder, or a file, of any layout", path=True)
    out: str | None = option(None, help="folder for evaluation.json, confusion.json and confusion.png", path=True)
    overwrite: bool = option(False, help="replace an earlier evaluation in `out`")
    knn: bool = option(False, help="nearest neighbours by the encoder's features instead")
    linear_probe: bool = option(False, help="logistic regression on the encoder's features instead")
    neighbours: int = option(20, help="of `knn`", above=0)
    val_split: float | None = option(
        None, help="fraction of each class to hold out, where there is no val or test", above=0, below=1
    )
    labels_per_class: int | None = option(None, help="training images of each class for the probes [all]", above=0)
    image_size: str | int | tuple[int, int] | None = option(
        None, help="pixels, as 224 or, height first, 224x320 [the weights']"
    )
    crop: str | None = option(
        None,
        help="resized: the centre of the image; native: the mean over windows that cover it [as in training]",
        choices=("resized", "native"),
    )
    crop_fraction: float | None = option(
        None,
        help="fraction of the sides that is evaluated [0.875; 1 up to 64 pixels, from 384 on, and on ImageNet-C]",
        above=0,
        at_most=1,
    )
    batch_size: int = option(64, help="images at once", above=0)
    seed: int = seed_option("of `val_split` and `labels_per_class`")
