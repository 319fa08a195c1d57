"""Every option of every command: one dataclass each, from which the command line is made."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from sparse_fcmae.errors import UserError


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: tuple[str, ...] | None = None,
    any_time: bool = False,
    positional: bool = False,
) -> Any:
    """A dataclass field with the help text of its flag; `any_time` marks what may differ when a run is resumed."""
    metadata = {"help": help, "choices": choices, "any_time": any_time, "positional": positional}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `sparse-fcmae pretrain` and `finetune` have in common."""

    command: ClassVar[str]
    backend: str = option("auto", help="auto, native, torch, masked or minkowski; see `sparse-fcmae info`")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...", any_time=True)
    dtype: str = option("auto", help="auto is bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    num_workers: int | None = option(
        None, help="processes loading images, a rank [one a core, up to 16]", any_time=True
    )
    max_bad_images: float = option(0.01, help="stop when a larger share of the files is unreadable", any_time=True)
    log_every: int = option(10, help="steps between updates of log and bar", any_time=True)
    save_every: int | None = option(None, help="steps between checkpoints [one epoch]", any_time=True)
    keep_checkpoints: int = option(3, help="newest checkpoints to keep", any_time=True)
    resume: bool = option(False, help="go on from the newest checkpoint in --out", any_time=True)
    overwrite: bool = option(False, help="delete the run that is in --out first", any_time=True)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Options of `sparse-fcmae pretrain`; the defaults are the paper's recipe (ConvNeXt V2, appendix A)."""

    command: ClassVar[str] = "pretraining"
    data: str = option(help="folder of images, flat or nested", any_time=True)
    out: str = option("runs/pretrain", help="run folder to make", any_time=True)
    init: str | None = option(
        None, help="go on from these weights, of any layout: encoder, and decoder where it has one"
    )

    model: str = option("atto", help="atto, femto, pico, nano, tiny, base, large or huge")
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320; a multiple of the patch")
    in_chans: int = option(3, help="channels: 3 for colour, 1 for greyscale")
    stem_stride: int = option(4, help="4, 2 or 1; the patch is 8 times that, so 2 or 1 suit small images")
    mask_ratio: float = option(0.6, help="share of the patches that is masked")
    mask_patch_size: int | None = option(None, help="draw masks in squares of this many pixels [the patch]")
    mask_grid: int | None = option(None, help="or draw masks on a grid of this many rows and columns")
    grn_scope: str = option("image", help="what the response norm pools over", choices=("image", "batch"))
    norm_pix_loss: bool = option(True, help="normalise each target patch")
    decoder_dim: int = option(512, help="width of the decoder")
    decoder_depth: int = option(1, help="blocks of the decoder")

    epochs: int = option(800, help="passes over the images")
    batch_size: int = option(4096, help="images an optimiser step, over all ranks and micro-batches")
    micro_batch_size: int = option(128, help="images a rank takes through the model at once")
    warmup_epochs: float | None = option(None, help="epochs of linear warm-up [5 %% of --epochs]")
    base_lr: float = option(1.5e-4, help="peak learning rate for each 256 images of --batch-size")
    lr: float | None = option(None, help="peak learning rate outright, instead of --base-lr")
    weight_decay: float = option(0.05, help="of AdamW; none on biases and norms")
    clip_grad: float | None = option(None, help="clip the gradient to this norm [off]")
    seed: int = option(0, help="of weights, data order, augmentation and masks")

    compile: bool = option(False, help="compile the model with torch.compile", any_time=True)
    cuda_graphs: bool = option(False, help="replay the training step from CUDA graphs (GPU only)", any_time=True)

    knn: str | None = option(
        None, help="labelled folder with train and val or test: k-NN on it meanwhile", any_time=True
    )
    every: int = option(10, help="epochs between the evaluations on --knn", any_time=True)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Options of `sparse-fcmae finetune`; what is None is the preset's (see `training.recipes`)."""

    command: ClassVar[str] = "fine-tuning"
    data: str = option(help="folder with train and val or test, each of class folders; see --val-split", any_time=True)
    out: str = option("runs/finetune", help="run folder to make", any_time=True)
    init: str | None = option(None, help="weights to fine-tune: run or other folder, or file, of any layout")
    from_scratch: bool = option(False, help="start from random weights instead, the baseline")
    preset: str | None = option(
        None, help="recipe of this size, or probe [that of the model, probe with --freeze-encoder]"
    )
    val_split: float | None = option(None, help="share of each class to hold out, where there is no val or test")
    labels_per_class: int | None = option(None, help="train on so many images of each class, chosen by --seed [all]")
    freeze_encoder: bool = option(False, help="train the final norm and the head alone")

    model: str = option("atto", help="with --from-scratch: atto, femto, pico, nano, tiny, base, large or huge")
    image_size: str | None = option(None, help="pixels, as 224 or, height first, 224x320 [that of --init, or 224]")
    in_chans: int = option(3, help="with --from-scratch: channels, 3 for colour, 1 for greyscale")
    stem_stride: int = option(4, help="with --from-scratch: 4, 2 or 1; the patch is 8 times that")

    epochs: int | None = option(None, help="passes over the images [preset]")
    batch_size: int = option(1024, help="images an optimiser step, over all ranks and micro-batches")
    micro_batch_size: int = option(64, help="images a rank takes through the model at once")
    warmup_epochs: float | None = option(None, help="epochs of linear warm-up [preset]")
    base_lr: float | None = option(None, help="peak learning rate for each 256 images of --batch-size [preset]")
    lr: float | None = option(None, help="peak learning rate outright, instead of --base-lr")
    min_lr: float = option(1e-6, help="learning rate at the end of the cosine")
    weight_decay: float | None = option(None, help="of AdamW; none on biases and norms [preset]")
    layer_decay: float | None = option(None, help="learning rate of a layer relative to the next one's [preset]")
    layer_decay_type: str | None = option(
        None, help="each block a layer, or groups of them [preset]", choices=("single", "group")
    )
    drop_path: float | None = option(None, help="stochastic depth of the last block [preset]")
    clip_grad: float | None = option(None, help="clip the gradient to this norm [off]")
    label_smoothing: float | None = option(None, help="share of the target spread over all classes [preset]")
    mixup: float | None = option(None, help="alpha of MixUp's beta distribution, 0 for none [preset]")
    cutmix: float | None = option(None, help="alpha of CutMix's beta distribution, 0 for none [preset]")
    rand_augment: float | None = option(None, help="RandAugment's magnitude, up to 10, 0 for none [preset]")
    random_erasing: float | None = option(None, help="probability of erasing a box of an image [preset]")
    min_crop: float = option(0.08, help="least share of the area in a random crop")
    ema_decay: float | None = option(None, help="of the moving average of the weights, 0 for none [preset]")
    seed: int = option(0, help="of new weights, data order, augmentation, --val-split and --labels-per-class")

    every: int = option(1, help="epochs between evaluations", any_time=True)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Options of `sparse-fcmae convert`."""

    source: str = option(help="run, checkpoint or exported folder, or weights of any layout", positional=True)
    destination: str = option(help="folder, or .safetensors, .pt, .pth or .onnx file, to make", positional=True)
    to: str = option(help="layout to write", choices=("official", "timm", "huggingface", "mmpretrain", "fcmae", "onnx"))
    overwrite: bool = option(False, help="replace the files of an earlier conversion")
    dry_run: bool = option(False, help="do and verify it all, print the report, leave nothing")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Options of `sparse-fcmae evaluate`."""

    data: str = option("", help="class folders, or a folder with these in val or test (and train, for the probes)")
    init: str = option("", help="weights: run, checkpoint or exported folder, or a file, of any layout")
    out: str | None = option(None, help="folder for evaluation.json, confusion.json and confusion.png")
    overwrite: bool = option(False, help="replace an earlier evaluation in --out")
    knn: bool = option(False, help="nearest neighbours by the encoder's features instead")
    linear_probe: bool = option(False, help="logistic regression on the encoder's features instead")
    neighbours: int = option(20, help="of --knn")
    val_split: float | None = option(None, help="share of each class to hold out, where there is no val or test")
    labels_per_class: int | None = option(None, help="training images of each class for the probes [all]")
    image_size: str | None = option(None, help="pixels, as 224 or, height first, 224x320 [the weights']")
    crop_share: float | None = option(
        None, help="share of the sides that is looked at [0.875; 1 up to 64 pixels, from 384 on, and on ImageNet-C]"
    )
    batch_size: int = option(64, help="images at once")
    seed: int = option(0, help="of --val-split and --labels-per-class")
    backend: str = option("auto", help="auto, native, torch, masked or minkowski; see `sparse-fcmae info`")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", help="auto is bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    num_workers: int | None = option(None, help="processes loading images [one a core, up to 16]")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of `sparse-fcmae demo`."""

    out: str = option("runs/demo", help="folder for the drawn images and the run")
    images: int = option(3000, help="images to draw")
    epochs: int = option(10, help="passes over the images")
    seed: int = option(0, help="of images, weights and masks")
    overwrite: bool = option(False, help="delete what an earlier demo left in --out first")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where every benchmark writes its rows."""

    json: str | None = option(None, help="write the rows to this file, or with - to the standard output")
    csv: str | None = option(None, help="append the rows to this file")


@dataclass(frozen=True, kw_only=True)
class GflopsConfig(OutputConfig):
    """Options of `sparse-fcmae bench gflops`; all but the last are lists with commas."""

    model: str = option("atto,femto,pico,nano,tiny,base,large,huge", help="sizes, with commas between them")
    image_size: str = option("224,384,512", help="pixels, with commas; 224x320 is height first")
    mask_ratio: str = option("0.6", help="shares of the patches that are masked, with commas, 0 for none")
    compare: str | None = option(None, help="models of timm to count beside, as timm:mvitv2_huge_cls@512, with commas")
    stages: bool = option(False, help="also print each stage's")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(OutputConfig):
    """Options of `sparse-fcmae bench profile`."""

    model: str = option("atto", help="atto, femto, pico, nano, tiny, base, large or huge")
    batch_size: int = option(32, help="images a step")
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320")
    mask_ratio: float = option(0.6, help="share of the patches that is masked, 0 for none")
    dtype: str = option("fp32", help="storage of features", choices=("fp32", "bf16"))
    rounds: int = option(5, help="timed rounds, all candidates taking turns")
    seed: int = option(0, help="of weights, images and masks")


@dataclass(frozen=True, kw_only=True)
class KernelsConfig(ProfileConfig):
    """Options of `sparse-fcmae bench kernels`."""

    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig(OutputConfig):
    """Options of `sparse-fcmae bench throughput`."""

    model: str = option("atto", help="sizes, with commas between them")
    batch_size: str = option("32", help="images a step, with commas; max for the most that fit twice, a power of two")
    image_size: str = option("224", help="pixels, with commas; 224x320 is height first")
    mask_ratio: str = option("0.6", help="shares of the patches that are masked, with commas, 0 for none")
    dtype: str = option("fp32", help="fp32, or bf16 for autocast, or both with a comma")
    backend: str = option("all", help="with commas; all that are usable")
    work: str = option(
        "forward,step,pretrain", help="encoder forward, and with backward (step), whole pretraining step"
    )
    compiled: bool = option(False, help="also each backend under torch.compile; takes minutes each")
    rounds: int = option(5, help="timed rounds, all candidates taking turns")
    seed: int = option(0, help="of weights, images and masks")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(OutputConfig):
    """Options of `sparse-fcmae bench scaling`."""

    over: str = option(
        "mask-ratio", help="what varies", choices=("mask-ratio", "image-size", "batch-size", "threads", "model")
    )
    values: str | None = option(None, help="its values, with commas [a usual range]")
    model: str = option("atto", help="atto, femto, pico, nano, tiny, base, large or huge")
    batch_size: int = option(8, help="images a step")
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320")
    mask_ratio: float = option(0.6, help="share of the patches that is masked, 0 for none")
    dtype: str = option("fp32", help="fp32, or bf16 for autocast", choices=("fp32", "bf16"))
    backend: str = option("native,masked", help="with commas; all that are usable")
    rounds: int = option(5, help="timed rounds, all candidates taking turns")
    seed: int = option(0, help="of weights, images and masks")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")
    png: str | None = option(None, help="draw the curves, with the ideal ones, into this file")


@dataclass(frozen=True, kw_only=True)
class DataConfig(OutputConfig):
    """Options of `sparse-fcmae bench data`."""

    data: str = option("", help="folder of images, flat or nested")
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320")
    images: int = option(400, help="images a round, from the first on")
    rounds: int = option(5, help="timed rounds, the candidates taking turns")
    seed: int = option(0, help="of the crops")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of `sparse-fcmae bench report`."""

    out: str = option("runs/bench", help="folder to make for report.html, plots and rows")
    model: str = option("atto,tiny", help="sizes to measure, with commas between them")
    data: str | None = option(None, help="folder of images, to measure loading too")
    rounds: int = option(5, help="timed rounds, all candidates taking turns")
    seed: int = option(0, help="of weights, images and masks")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")
    overwrite: bool = option(False, help="replace an earlier report in --out")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(OutputConfig):
    """Options of `sparse-fcmae bench compare`."""

    task: str = option(
        "finetune",
        help="against ConvNeXt V2 and MViTv2 of other libraries, or (pretrain) against a ViT's masked autoencoder",
        choices=("finetune", "pretrain"),
    )
    model: str = option("atto", help="atto, femto, pico, nano, tiny, base, large or huge")
    batch_size: int = option(32, help="images a step")
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320")
    dtype: str = option("fp32", help="fp32, or bf16 for autocast", choices=("fp32", "bf16"))
    drop_path: float = option(0.0, help="stochastic depth of the last block, for finetune")
    rounds: int = option(5, help="timed rounds, all candidates taking turns")
    seed: int = option(0, help="of weights, images, labels and masks")
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")


def differences(a: Any, b: Any) -> list[str]:
    """Names of the options in which two configs differ, `any_time` ones left out."""
    return [f.name for f in fields(a) if not f.metadata["any_time"] and getattr(a, f.name) != getattr(b, f.name)]


def shown_size(size: tuple[int, int]) -> str:
    """(height, width) as the flag has it: "224", or "224x320"."""
    return "x".join(map(str, dict.fromkeys(size)))


def image_size_of(value: str | int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of 224, "224", "224x320" or (224, 320)."""
    if isinstance(value, int):
        value = (value,)
    try:
        sides = [int(side) for side in (value.lower().split("x") if isinstance(value, str) else value)]
        height, width = sides * 2 if len(sides) == 1 else sides
    except (TypeError, ValueError):
        raise UserError(f"--image-size {value}: give pixels as 224 or, height first, 224x320") from None
    return height, width


def listed(name: str, value: str, kind: Callable[[str], Any], known: Iterable[str] | None = None) -> list[Any]:
    """The parts of a flag's value with commas. Raises UserError where one is not of its kind, or of those known."""
    try:
        parts = [kind(part.strip()) for part in str(value).split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{flag(name)} {value}: give numbers with commas between them") from None
    if unknown := [part for part in parts if known is not None and part not in known]:
        raise UserError(f"unknown {name.replace('_', ' ')} {unknown[0]!r}: choose of {', '.join(known)}")
    if not parts:
        raise UserError(f"{flag(name)} is empty: give at least one")
    return list(dict.fromkeys(parts))


def flag(name: str) -> str:
    """The command line's flag for an option: "--kebab-case"."""
    return "--" + name.replace("_", "-")
