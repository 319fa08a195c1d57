"""The options of `sparse-fcmae evaluate`, `embed`, `predict`, `reconstruct` and `analyze`."""

from dataclasses import dataclass

from sparse_fcmae.data.config import MaskConfig, ReadingConfig
from sparse_fcmae.runtime.compute import ComputeConfig
from sparse_fcmae.runtime.options import option, option_of, seed_option

WEIGHTS = "weights: run, checkpoint or exported folder, file of any layout, or a name as timm:convnextv2_tiny.fcmae"


@dataclass(frozen=True, kw_only=True)
class SeeingConfig(ReadingConfig, ComputeConfig):
    """Options of what a model sees of images, and how many at once."""

    image_size: str | int | tuple[int, int] | None = option(
        None, help="pixels, as 224 or, height first, 224x320 [the weights']"
    )
    crop: str | None = option(
        None,
        help="resized: the centre of the image; native: windows that cover it, in its own resolution [as in training]",
        choices=("resized", "native"),
    )
    crop_fraction: float | None = option(
        None,
        help="fraction of the sides that is seen [0.875; 1 up to 64 pixels, from 384 on, and on ImageNet-C]",
        above=0,
        at_most=1,
    )
    batch_size: int = option(64, help="images at once", above=0)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SeeingConfig, MaskConfig):
    """Options of `sparse-fcmae evaluate`."""

    data: str = option(
        help="class folders, or these in val or test (and train, for the probes), a table (.csv, .tsv), archives "
        "(.tar), Parquet files or a saved data set",
        path=True,
    )
    init: str = option(help=WEIGHTS, path=True)
    out: str | None = option(None, help="folder for evaluation.json, confusion.json and confusion.png", path=True)
    overwrite: bool = option(False, help="replace an earlier evaluation in `out`")
    knn: bool = option(False, help="nearest neighbours by the encoder's features instead")
    linear_probe: bool = option(False, help="logistic regression on the encoder's features instead")
    neighbours: int = option(20, help="of `knn`", above=0)
    val_split: float | None = option(
        None, help="fraction of each class to hold out, where there is no val or test", above=0, below=1
    )
    labels_per_class: int | None = option(None, help="training images of each class for the probes [all]", above=0)
    per_image: str | None = option(
        None, help="table of what the classifier says of each image: .csv, .jsonl or .parquet", path=True
    )
    seed: int = seed_option("of `val_split` and `labels_per_class`")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(SeeingConfig):
    """Options of `sparse-fcmae embed`."""

    data: str | tuple[str, ...] = option(help="images, of any kind that pretraining takes", path=True)
    init: str = option_of(EvaluateConfig, "init")
    out: str = option(help="file for the features: .npz, .parquet or .npy", path=True)
    overwrite: bool = option(False, help="replace what is in `out`")
    stage: int = option(4, help="whose features, at 1, 2, 4 and 8 times the stem's stride", choices=(1, 2, 3, 4))
    maps: bool = option(False, help="keep the features of every position instead of their mean")
    preview: str | bool = option(
        False,
        help="draw a map of the images beside `out`, by principal components, or by umap",
        choices=(False, True, "umap"),
        value_optional=True,
    )
    duplicates: float | None = option(
        None, help="list pairs of images at least so similar, as 0.98, in a table beside `out`", above=-1, at_most=1
    )
    nearest: str | None = option(
        None, help="an image, or the window in its middle, of which those most similar are printed", path=True
    )
    neighbours: int = option(10, help="how many of these", above=0)


@dataclass(frozen=True, kw_only=True)
class PredictConfig(SeeingConfig):
    """Options of `sparse-fcmae predict`."""

    data: str | tuple[str, ...] = option_of(EmbedConfig, "data")
    init: str = option_of(EvaluateConfig, "init")
    out: str = option(
        help="table of what a classifier says of each image: .csv, .jsonl or .parquet; of a segmentation model the "
        "folder for masks",
        path=True,
    )
    overwrite: bool = option(False, help="replace what is in `out`")
    top_k: int = option(5, help="classes of each image, the most probable first", above=0)
    flips: str | None = option(
        None,
        help="mean over an image and its mirror images: horizontal, or both for images without an upright position",
        choices=("horizontal", "both"),
    )
    windows: bool = option(False, help="a row for each native window instead of one for each image")
    maps: str | None = option(
        None, help="folder for maps of the classes of each image's native windows, or of its pixels", path=True
    )


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(SeeingConfig):
    """Options of `sparse-fcmae reconstruct`."""

    data: str | tuple[str, ...] = option_of(EmbedConfig, "data")
    init: str = option(help="a run of `pretrain`, one of its checkpoints, or one of the official code's", path=True)
    out: str = option(help="picture: .png, or an animation over a run's checkpoints: .webp or .gif", path=True)
    overwrite: bool = option(False, help="replace what is in `out`")
    images: int = option(8, help="images or windows to show, spread evenly over all", above=0, at_most=1000)
    masks: int = option(1, help="masks of each image", above=0, at_most=1000)
    mask_ratio: float | None = option(None, help="fraction of the patches that is masked [the run's]", at_least=0)
    mask: str | None = option(None, help="picture of a mask, white where patches are hidden", path=True)
    show: str | None = option(
        None, help="channels shown as red, green and blue, counted from 1, as 4,3,2 [the first ones]"
    )
    seed: int = seed_option("of the masks")


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(SeeingConfig):
    """Options of `sparse-fcmae analyze`."""

    data: str | tuple[str, ...] = option_of(EmbedConfig, "data")
    init: str | tuple[str, ...] = option(help=f"{WEIGHTS}; several to compare", path=True)
    out: str = option(help="folder for analysis.json and the pictures", path=True)
    overwrite: bool = option(False, help="replace an earlier analysis in `out`")
    images: int = option(256, help="how many images or windows, spread evenly over all", above=0)
