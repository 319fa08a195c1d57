"""The options of `sparse-fcmae bench`."""

from dataclasses import dataclass

from sparse_fcmae.runtime.options import option

MOST = 1 << 24  # images, and rounds


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where every benchmark writes its rows."""

    json: str | None = option(None, help="write the rows to this file, or with - to the standard output", path=True)
    csv: str | None = option(None, help="append the rows to this file", path=True)


@dataclass(frozen=True, kw_only=True)
class GflopsConfig(OutputConfig):
    """Options of `sparse-fcmae bench gflops`; all but the last are lists with commas."""

    model: str = option("atto,femto,pico,nano,tiny,base,large,huge", help="sizes, with commas between them")
    image_size: str = option("224,384,512", help="pixels, with commas; 224x320 is height first")
    mask_ratio: str = option("0.6", help="fractions of the patches that are masked, with commas, 0 for none")
    compare: str | None = option(None, help="models of timm to count beside, as timm:mvitv2_huge_cls@512, with commas")
    stages: bool = option(False, help="also print each stage's")


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Options of all that measures times."""

    rounds: int = option(5, help="timed rounds, all candidates taking turns", above=0, at_most=MOST)
    seed: int = option(0, help="of weights, images, labels, crops and masks", at_least=0, below=2**63)


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(RoundsConfig):
    """Options of what can be measured on a GPU too."""

    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Options of a benchmark of one model's steps."""

    model: str = option("atto", help="atto, femto, pico, nano, tiny, base, large or huge")
    batch_size: int = option(32, help="images a step", above=0, at_most=MOST)
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320")
    dtype: str = option("fp32", help="fp32, or bf16 for autocast", choices=("fp32", "bf16"))


@dataclass(frozen=True, kw_only=True)
class MaskedStepConfig(StepConfig):
    """Options of a benchmark of one model's steps on masked images."""

    mask_ratio: float = option(0.6, help="fraction of the patches that is masked, 0 for none", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(OutputConfig, RoundsConfig, MaskedStepConfig):
    """Options of `sparse-fcmae bench profile`."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig(OutputConfig, DeviceConfig, MaskedStepConfig):
    """Options of `sparse-fcmae bench kernels`."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig(OutputConfig, DeviceConfig):
    """Options of `sparse-fcmae bench throughput`."""

    model: str = option("atto", help="sizes, with commas between them")
    batch_size: str = option("32", help="images a step, with commas; max for the most that fit twice, a power of two")
    image_size: str = option("224", help="pixels, with commas; 224x320 is height first")
    mask_ratio: str = option("0.6", help="fractions of the patches that are masked, with commas, 0 for none")
    dtype: str = option("fp32", help="fp32, or bf16 for autocast, or both with a comma")
    backend: str = option("all", help="with commas; all that are usable")
    work: str = option(
        "forward,step,pretrain", help="encoder forward, and with backward (step), whole pretraining step"
    )
    compiled: bool = option(False, help="also each backend under torch.compile; takes minutes each")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(OutputConfig, DeviceConfig, MaskedStepConfig):
    """Options of `sparse-fcmae bench scaling`."""

    over: str = option(
        "mask-ratio", help="what varies", choices=("mask-ratio", "image-size", "batch-size", "threads", "model")
    )
    values: str | None = option(None, help="its values, with commas [a usual range]")
    batch_size: int = option(8, help="images a step", above=0, at_most=MOST)
    backend: str = option("native,masked", help="with commas; all that are usable")
    png: str | None = option(None, help="draw the curves, with the ideal ones, into this file", path=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig(OutputConfig, RoundsConfig):
    """Options of `sparse-fcmae bench data`."""

    data: str = option("", help="folder of images, flat or nested", path=True)
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320")
    images: int = option(400, help="images a round, from the first on", above=0, at_most=MOST)


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig(OutputConfig, DeviceConfig, MaskedStepConfig):
    """Options of `sparse-fcmae bench pretrain`."""

    data: str = option("", help="folder of images, flat or nested", path=True)
    batch_size: int = option(64, help="images a step", above=0, at_most=MOST)
    rounds: int = option(3, help="times that decoding, steps and a run take turns", above=0, at_most=MOST)
    steps: int = option(30, help="steps of a run that are counted", above=0, at_most=MOST)


@dataclass(frozen=True, kw_only=True)
class AblationsConfig(OutputConfig):
    """Options of `sparse-fcmae bench ablations`; `variants`, `seeds` and `labels` are lists with commas."""

    data: str = option("", help="folder with train, and val or test, each of class folders", path=True)
    out: str = option("runs/ablations", help="folder for the runs; goes on there", path=True)
    variants: str = option(
        "base,no-grn,v1-block,dense,mask-0.3,mask-0.9,decoder-3,random",
        help="what to pretrain; of these, and mask-0.75",
    )
    seeds: str = option("0,1,2", help="of weights, order, crops, masks, and of the labels that are drawn")
    labels: str | None = option(None, help="labels a class to fine-tune on, as 1,10,100 [no fine-tuning]")
    model: str = option("atto", help="atto, femto, pico, nano, tiny, base, large or huge")
    image_size: str = option("224", help="pixels, as 224 or, height first, 224x320")
    stem_stride: int = option(4, help="the patch is 8 times that, so 2 or 1 suit small images", choices=(4, 2, 1))
    batch_size: int = option(128, help="images a step of pretraining", above=0, at_most=MOST)
    epochs: int = option(16, help="of pretraining", above=0)
    lr: float = option(1e-3, help="peak learning rate of pretraining", above=0)
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", help="auto is bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    png: str | None = option(None, help="draw what was learnt into this file", path=True)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(OutputConfig, DeviceConfig, StepConfig):
    """Options of `sparse-fcmae bench compare`."""

    task: str = option(
        "finetune",
        help="against ConvNeXt V2 and MViTv2 of other libraries, or (pretrain) against a ViT's masked autoencoder",
        choices=("finetune", "pretrain"),
    )
    drop_path: float = option(0.0, help="stochastic depth of the last block, for finetune", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """Options of `sparse-fcmae bench gpu`."""

    out: str = option("runs/gpu", help="folder for rows, logs, summary and what is compiled; goes on there", path=True)
    minutes: float = option(9.0, help="after which this call ends; the next one goes on", above=0)
    parts: str | None = option(None, help="parts to measure again, such as tests,memory [all not done]")
    data: str | None = option(None, help="folder of images, to pretrain from files too", path=True)
    device: str = option("cuda", help="cuda, cuda:1, ...")


@dataclass(frozen=True, kw_only=True)
class SummaryConfig:
    """Options of `sparse-fcmae bench summary`."""

    rows: str = option(
        help="folder with rows of benchmarks, .json and .csv, or a pattern of such files", positional=True
    )
    into: str | None = option(None, help="file to put the table into, between its two marks", path=True)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(DeviceConfig):
    """Options of `sparse-fcmae bench report`."""

    out: str = option("runs/bench", help="folder to make for report.html, plots and rows", path=True)
    model: str = option("atto,tiny", help="sizes to measure, with commas between them")
    data: str | None = option(None, help="folder of images, to measure loading too", path=True)
    overwrite: bool = option(False, help="replace an earlier report in --out")
