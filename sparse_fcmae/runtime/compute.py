"""The options that say what a command computes on, shared by training and evaluation."""

from dataclasses import dataclass

from sparse_fcmae.runtime.options import option

BACKENDS = ("auto", "native", "torch", "masked", "minkowski")  # as in `sparse_fcmae.backends`, which imports torch


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Backend, device, dtype and loader processes of a command.

    The first three change results by rounding. Another device also draws other masks, as a GPU's random numbers from
    the same seed are not a CPU's.
    """

    backend: str = option("auto", help="what runs the encoder; see `sparse-fcmae info`", choices=BACKENDS)
    device: str = option("auto", help="auto, cpu, cuda, cuda:1, ...", resumable=True)
    dtype: str = option("auto", help="auto is bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    num_workers: int | None = option(
        None,
        help="processes that load images for one that computes [one for every 4 cores; for a GPU one a core, up to 16]",
        at_least=0,
        at_most=1024,
        resumable=True,
    )
