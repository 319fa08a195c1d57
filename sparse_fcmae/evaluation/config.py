"""The options of `sparse-fcmae evaluate`."""

from dataclasses import dataclass

from sparse_fcmae.runtime.options import option


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of `sparse-fcmae evaluate`."""

    data: str = option(
        help="class folders, or a folder with these in val or test (and train, for the probes)", path=True
    )
    init: str = option(help="weights: run, checkpoint or exported folder, or a file, of any layout", path=True)
    out: str | None = option(None, help="folder for evaluation.json, confusion.json and confusion.png", path=True)
    overwrite: bool = option(False, help="replace an earlier evaluation in --out")
    knn: bool = option(False, help="nearest neighbours by the encoder's features instead")
    linear_probe: bool = option(False, help="logistic regression on the encoder's features instead")
    neighbours: int = option(20, help="of --knn", above=0)
    val_split: float | None = option(
        None, help="fraction of each class to hold out, where there is no val or test", above=0, below=1
    )
    labels_per_class: int | None = option(None, help="training images of each class for the probes [all]", above=0)
    image_size: str | None = option(None, help="pixels, as 224 or, height first, 224x320 [the weights']")
    crop_fraction: float | None = option(
        None,
        help="fraction of the sides that is evaluated [0.875; 1 up to 64 pixels, from 384 on, and on ImageNet-C]",
        above=0,
        at_most=1,
    )
    batch_size: int = option(64, help="images at once", above=0)
    seed: int = option(0, help="of --val-split and --labels-per-class", at_least=0, below=2**32)
    backend: str = option("auto", help="auto, native, torch, masked or minkowski; see `sparse-fcmae info`")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", help="auto is bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    num_workers: int | None = option(
        None, help="processes that load images [one for every 4 cores; beside a GPU one a core, up to 16]", at_least=0
    )
