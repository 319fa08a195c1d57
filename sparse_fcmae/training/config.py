"""The options that every training run has."""

from dataclasses import dataclass
from typing import ClassVar

from sparse_fcmae.data.config import ViewConfig
from sparse_fcmae.runtime.compute import ComputeConfig
from sparse_fcmae.runtime.options import option

# options that the weights fix which a run starts from
OF_WEIGHTS = (
    *("model", "depths", "dims", "in_chans", "stem_stride", "grn", "layer_scale"),
    *("channels", "stats", "mean", "std", "value_range"),
)


@dataclass(frozen=True, kw_only=True)
class RunConfig(ViewConfig, ComputeConfig):
    """Options that `sparse-fcmae pretrain` and `finetune` have in common.

    kind names the run in messages and in its config.json, command is the one that starts it.
    """

    kind: ClassVar[str]
    command: ClassVar[str]

    # options whose defaults and help differ between the tasks
    data: str | tuple[str, ...] | None
    out: str
    init: str | None
    image_size: str | int | tuple[int, int] | None
    epochs: int | None
    batch_size: int | None
    micro_batch_size: int
    warmup_epochs: float | None
    base_lr: float | None
    lr: float | None
    clip_grad: float | None
    seed: int
    eval_every: int

    parallel: str = option(
        "ddp",
        help="each process has the whole model (ddp), a shard (fsdp), or a shard of a copy on its machine (hsdp)",
        choices=("ddp", "fsdp", "hsdp"),
        resumable=True,
    )
    cpu_offload: bool = option(False, help="with fsdp or hsdp: shards stay in the machine's memory", resumable=True)
    grad_checkpointing: bool = option(
        False, help="compute a block's inside again in the backward pass, to keep less", resumable=True
    )

    config: str | None = option(
        None,
        help="file of options, TOML or JSON, as a run's config.json; others given go first",
        path=True,
        resumable=True,
    )
    max_steps: int | None = option(
        None, help="end the schedule after so many steps, whatever `epochs` says", above=0, changes_run=True
    )
    lr_range: str | None = option(
        None, help="learning-rate range test: raise the rate as 1e-6,1 over `max_steps` [100] and say which serves"
    )
    hang_minutes: float = option(
        30.0,
        help="several processes: end after so many minutes without a step, and say which one hangs",
        above=0,
        resumable=True,
    )
    deterministic: bool = option(
        False, help="PyTorch's deterministic algorithms alone, which on a GPU are slower", resumable=True
    )
    max_bad_images: float = option(
        0.01, help="stop when a larger fraction of the files is unreadable", at_least=0, resumable=True
    )
    max_nonfinite: int = option(
        10, help="stop after so many steps in a row whose loss or gradient is not finite", above=0, resumable=True
    )
    monitor: str | None = option(
        None, help="keep the best checkpoint by this value of the evaluations, and export it", resumable=True
    )
    patience: int | None = option(
        None, help="stop after so many evaluations without a better `monitor`", above=0, resumable=True
    )
    log_to: str | None = option(
        None,
        help="trackers, with commas: tensorboard, wandb, mlflow, trackio, comet [TensorBoard, if it is installed]",
        resumable=True,
    )
    log_every: int = option(10, help="steps between updates of log and bar", above=0, resumable=True)
    save_every: int | None = option(
        None,
        help="steps between checkpoints [an epoch or 500 steps, whichever is less, but at least a minute]",
        above=0,
        resumable=True,
    )
    save_minutes: float | None = option(
        None, help="or minutes between checkpoints, whatever the steps", above=0, resumable=True
    )
    keep_checkpoints: int = option(3, help="how many of the newest checkpoints to keep", above=0, resumable=True)
    keep_every: int | None = option(
        None, help="and all checkpoints of steps that this number divides", above=0, resumable=True
    )
    resume: bool | str = option(
        False,
        help="go on from the newest checkpoint in `out`; auto: or begin where there is no run yet",
        choices=(False, True, "auto"),
        resumable=True,
        value_optional=True,
    )
    overwrite: bool = option(False, help="delete the run that is in `out` first", resumable=True)


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Options of `sparse-fcmae runs`."""

    folder: str = option("runs", help="folder that holds runs, at any depth", path=True, positional=True)
