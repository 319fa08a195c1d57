"""The options of `sparse-fcmae pretrain` and `finetune`."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_fcmae.data.config import MaskConfig, ViewConfig
from sparse_fcmae.runtime.options import option, option_of, seed_option
from sparse_fcmae.training.config import RunConfig

MODELS = (
    "atto",
    "femto",
    "pico",
    "nano",
    "tiny",
    "base",
    "large",
    "huge",
    "giant",
    "gigantic",
)  # `model.convnext` needs torch
STRIDES = (4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Options of `sparse-fcmae pretrain`; what is None follows from the recipe (see `tasks.recipes`)."""

    kind: ClassVar[str] = "pretraining"
    command: ClassVar[str] = "pretrain"

    data: str | tuple[str, ...] | None = option(
        None,
        help="folder of images, flat or nested, archives as 'shards/{000..099}.tar', a table (.csv, .tsv), Parquet "
        "files or a saved data set, a text file (.txt) with a path a line, a pattern as 'scans/*.png', or several of "
        "these",
        path=True,
        resumable=True,
    )
    out: str = option("runs/pretrain", help="run folder to make", path=True, resumable=True)
    init: str | None = option(
        None, help="go on from these weights, of any layout: encoder, and decoder where it has one", path=True
    )
    recipe: str = option(
        "auto",
        help="auto: batch, epochs and learning rate that suit the number of images; paper: the paper's",
        choices=("auto", "paper"),
    )

    model: str = option("atto", help="size of the encoder", choices=MODELS)
    depths: str | None = option(None, help="blocks of the four stages, as 3,3,9,3 [those of `model`]")
    dims: str | None = option(None, help="channels of the four stages, as 96,192,384,768 [those of `model`]")
    image_size: str | int | tuple[int, int] = option(
        "224", help="pixels, as 224 or, height first, 224x320; a multiple of the patch"
    )
    stem_stride: int = option(4, help="the patch is 8 times that, so 2 or 1 suit small images", choices=STRIDES)
    mask_ratio: float = option(0.6, help="fraction of the patches that is masked", at_least=0)
    mask_patch_size: int | None = option(None, help="draw masks in squares of this many pixels [the patch]", above=0)
    mask_grid: int | None = option(None, help="or draw masks on a grid of this many rows and columns", above=0)
    grn_scope: str = option("image", help="what the response norm pools over", choices=("image", "batch"))
    grn: bool = option(True, help="have the response norm in the encoder's blocks; without it for comparison")
    layer_scale: bool = option(False, help="scale what the encoder's blocks add, as in ConvNeXt V1, for comparison")
    sparse: bool = option(True, help="encode the visible patches alone; dense, with zeros, for comparison")
    norm_pix_loss: bool = option(True, help="normalise each target patch")
    decoder_dim: int = option(512, help="width of the decoder", above=0, at_most=65536)
    decoder_depth: int = option(1, help="blocks of the decoder", above=0, at_most=1000)

    epochs: int | None = option(None, help="passes over the images [recipe]", above=0, changes_run=True)
    batch_size: int | None = option(
        None, help="images an optimiser step, over all ranks and micro-batches [recipe]", above=0
    )
    micro_batch_size: int = option(128, help="images a rank takes through the model at once", above=0, resumable=True)
    warmup_epochs: float | None = option(None, help="epochs of linear warm-up [5 % of `epochs`]", at_least=0)
    base_lr: float | None = option(
        None, help="peak learning rate for each 256 images of `batch_size`", above=0, changes_run=True
    )
    lr: float | None = option(None, help="peak learning rate outright [recipe]", above=0, changes_run=True)
    weight_decay: float = option(0.05, help="of AdamW; none on biases and LayerNorms", at_least=0)
    clip_grad: float | None = option(None, help="clip the gradient to this norm [off]", above=0, changes_run=True)
    ema_decay: float | None = option(
        None, help="keep a moving average of the weights too, as 0.9999 [off]", above=0, below=1
    )
    seed: int = seed_option("of weights, data order, augmentation and masks")

    compile: bool = option(False, help="compile the model with torch.compile", resumable=True)
    cuda_graphs: bool | None = option(
        None, help="replay the training step from CUDA graphs [yes on a GPU, in one process]", resumable=True
    )

    knn: str | None = option(
        None, help="labelled folder with train and val or test: k-NN on it meanwhile", path=True, resumable=True
    )
    val: str | None = option(
        None,
        help="images that are held out, named as `data`: their loss meanwhile, under fixed masks",
        path=True,
        resumable=True,
    )
    eval_every: int = option(10, help="epochs between the evaluations on `knn` and `val`", above=0, resumable=True)


@dataclass(frozen=True, kw_only=True)
class InspectConfig(ViewConfig):
    """Options of `sparse-fcmae inspect`: those of `pretrain` that say how images are read and seen."""

    data: str | tuple[str, ...] | None = option(
        None, help="what `pretrain` takes: a folder, archives, a table, a list, a pattern", path=True
    )
    out: str | None = option(None, help="folder for inspection.json, histograms.png and views.png", path=True)
    overwrite: bool = option(False, help="replace an earlier inspection in `out`")
    image_size: str | int | tuple[int, int] = option(
        "224", help="pixels of the views, as 224 or, height first, 224x320"
    )
    images: int = option(10000, help="how many images to look at, spread evenly over all", above=0)
    seed: int = seed_option("of the values that are measured and the views that are drawn")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Options of `sparse-fcmae plan`: those of `pretrain` that memory and time depend on, and what to compute with."""

    model: str = option_of(PretrainConfig, "model")
    depths: str | None = option_of(PretrainConfig, "depths")
    dims: str | None = option_of(PretrainConfig, "dims")
    gpus: int = option(1, help="devices, over all machines", above=0)
    gpus_per_machine: int = option(8, help="devices of a machine, within which hsdp shards", above=0)
    images: int = option(1_281_167, help="images that are trained on", above=0)
    epochs: int | None = option_of(PretrainConfig, "epochs")
    batch_size: int | None = option_of(PretrainConfig, "batch_size")
    micro_batch_size: int = option_of(PretrainConfig, "micro_batch_size")
    image_size: str | int | tuple[int, int] = option_of(PretrainConfig, "image_size")
    in_chans: int | None = option_of(PretrainConfig, "in_chans")
    stem_stride: int = option_of(PretrainConfig, "stem_stride")
    mask_ratio: float = option_of(PretrainConfig, "mask_ratio")
    decoder_dim: int = option_of(PretrainConfig, "decoder_dim")
    decoder_depth: int = option_of(PretrainConfig, "decoder_depth")
    grad_checkpointing: bool = option_of(PretrainConfig, "grad_checkpointing")
    dtype: str = option("bf16", help="of the matrix products", choices=("bf16", "fp32"))
    device: str = option("cuda", help="kind of device, whose kernels decide what is kept", choices=("cuda", "cpu"))
    device_gb: float = option(80.0, help="memory of a device", above=0)
    tflops: float | None = option(None, help="peak of a device in that dtype [989 of an H100, in bf16]", above=0)
    efficiency: float = option(0.09, help="share of the peak that is reached; base reached 0.09 of an H100", above=0)
    images_per_second: float | None = option(
        None, help="speed of one device, as measured, instead of `tflops` and `efficiency`", above=0
    )
    image_kb: float = option(110.0, help="kB of an image's file", above=0)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig, MaskConfig):
    """Options of `sparse-fcmae finetune`; what is None is the preset's (see `tasks.recipes`)."""

    kind: ClassVar[str] = "fine-tuning"
    command: ClassVar[str] = "finetune"

    data: str | None = option(
        None,
        help="folder with train and val or test, each of class folders, a table (.csv, .tsv), archives (.tar), Parquet "
        "files or a saved data set; see `val_split`",
        path=True,
        resumable=True,
    )
    out: str = option("runs/finetune", help="run folder to make", path=True, resumable=True)
    task: str = option(
        "classification",
        help="what a label is: one class, several with semicolons between them, a number, or a mask",
        choices=("classification", "multilabel", "regression", "segmentation"),
    )
    init: str | None = option(None, help="weights to fine-tune: run or other folder, or file, of any layout", path=True)
    from_scratch: bool = option(False, help="start from random weights instead, the baseline")
    preset: str | None = option(
        None,
        help="recipe of this size, or probe [that of the model, probe with `freeze_encoder`]",
        choices=(*MODELS, "probe"),
    )
    val_split: float | None = option(
        None, help="fraction of each class to hold out, where there is no val or test", above=0, below=1
    )
    labels_per_class: int | None = option(
        None, help="train on so many images of each class, chosen by `seed` [all]", above=0
    )
    class_weights: str | None = option(
        None, help="balanced: rare classes count as much in the loss as frequent ones", choices=("balanced",)
    )
    freeze_encoder: bool = option(False, help="train what is behind the encoder alone")
    head_channels: int | None = option(
        None, help="of segmentation: width of UperNet [128, from tiny on 512]", above=0, at_most=8192
    )

    model: str = option("atto", help="with `from_scratch`: size of the encoder", choices=MODELS)
    depths: str | None = option(None, help="with `from_scratch`: blocks of the four stages, as 3,3,9,3")
    dims: str | None = option(None, help="with `from_scratch`: channels of the four stages, as 96,192,384,768")
    image_size: str | int | tuple[int, int] | None = option(
        None, help="pixels, as 224 or, height first, 224x320 [that of `init`, or 224]"
    )
    stem_stride: int = option(4, help="with `from_scratch`: the patch is 8 times that", choices=STRIDES)
    grn: bool = option(True, help="with `from_scratch`: have the response norm in the blocks")
    layer_scale: bool = option(False, help="with `from_scratch`: scale what blocks add, as in ConvNeXt V1")

    epochs: int | None = option(None, help="passes over the images [preset]", above=0, changes_run=True)
    batch_size: int | None = option(
        None, help="images an optimiser step, over all ranks and micro-batches [1024, of segmentation 16]", above=0
    )
    micro_batch_size: int = option(
        64, help="images a rank takes through the model, and mixes, at once", above=0, changes_run=True
    )
    warmup_epochs: float | None = option(None, help="epochs of linear warm-up [preset]", at_least=0)
    base_lr: float | None = option(
        None, help="peak learning rate for each 256 images of `batch_size` [preset]", above=0, changes_run=True
    )
    lr: float | None = option(None, help="peak learning rate outright, instead of `base_lr`", above=0, changes_run=True)
    min_lr: float = option(1e-6, help="learning rate at the end of the cosine", at_least=0)
    weight_decay: float | None = option(None, help="of AdamW; none on biases and norms [preset]", at_least=0)
    layer_decay: float | None = option(
        None, help="learning rate of a layer relative to the next one's [preset]", above=0
    )
    layer_decay_type: str | None = option(
        None, help="each block a layer, or groups of them [preset]", choices=("single", "group")
    )
    drop_path: float | None = option(None, help="stochastic depth of the last block [preset]", at_least=0, below=1)
    clip_grad: float | None = option(None, help="clip the gradient to this norm [off]", above=0, changes_run=True)
    label_smoothing: float | None = option(
        None, help="fraction of the target spread over all classes [preset]", at_least=0, below=1
    )
    mixup: float | None = option(None, help="alpha of MixUp's beta distribution, 0 for none [preset]", at_least=0)
    cutmix: float | None = option(None, help="alpha of CutMix's beta distribution, 0 for none [preset]", at_least=0)
    rand_augment: float | None = option(
        None, help="RandAugment's magnitude, up to 10, 0 for none [preset]", at_least=0, at_most=10
    )
    random_erasing: float | None = option(
        None, help="probability of erasing a box of an image [preset]", at_least=0, at_most=1
    )
    min_crop: float = option(0.08, help="least fraction of the area in a random crop", above=0, at_most=1)
    ema_decay: float | None = option(
        None, help="of the moving average of the weights, 0 for none [preset]", at_least=0, below=1
    )
    seed: int = seed_option("of new weights, data order, augmentation, `val_split` and `labels_per_class`")

    eval_every: int = option(1, help="epochs between evaluations", above=0, resumable=True)
