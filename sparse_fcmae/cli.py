"""The command line: sub-commands made from the dataclasses in `config`."""

import argparse
import os
import platform
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, NoReturn

import torch

from sparse_fcmae import __version__
from sparse_fcmae.config import (
    CompareConfig,
    ConvertConfig,
    DataConfig,
    DemoConfig,
    EvaluateConfig,
    FinetuneConfig,
    GflopsConfig,
    KernelsConfig,
    PretrainConfig,
    ProfileConfig,
    ReportConfig,
    ScalingConfig,
    ThroughputConfig,
    flag,
)
from sparse_fcmae.errors import Interrupted, UserError


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run_pretrain(options: dict[str, Any]) -> None:
    from sparse_fcmae.training.pretrain import pretrain

    pretrain(**options)


def run_finetune(options: dict[str, Any]) -> None:
    from sparse_fcmae.training.finetune import finetune

    finetune(**options)


def run_convert(options: dict[str, Any]) -> None:
    from sparse_fcmae.convert import convert

    print(convert(options.pop("source"), options.pop("destination"), **options))


def run_demo(options: dict[str, Any]) -> None:
    from sparse_fcmae.demo import demo

    demo(**options)


def run_evaluate(options: dict[str, Any]) -> None:
    from sparse_fcmae.evaluate import evaluate

    evaluate(**options)


def run_gflops(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.gflops import gflops

    gflops(**options)


def run_compare(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.compare import compare

    compare(**options)


def run_report(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.report import report

    report(**options)


def run_scaling(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.scaling import scaling

    scaling(**options)


def run_data(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.data import data

    data(**options)


def run_kernels(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.kernels import kernels

    kernels(**options)


def run_profile(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.profile import profile_step

    profile_step(**options)


def run_throughput(options: dict[str, Any]) -> None:
    from sparse_fcmae.benchmarks.throughput import throughput

    throughput(**options)


def run_info(options: dict[str, Any]) -> None:
    from sparse_fcmae import available_backends
    from sparse_fcmae.backends import default_device
    from sparse_fcmae.kernels import cpu

    device = default_device()
    print(f"sparse-fcmae {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"device {device}, {torch.get_num_threads()} CPU threads, CPU kernels for {cpu.instruction_set() or 'none'}")
    for name, reason in available_backends(device).items():
        print(f"backend {name:7} {reason or 'usable'}")


# name: what it does, config, run
COMMANDS: dict[str, tuple[str, type | None, Callable[[dict[str, Any]], None]]] = {
    "pretrain": ("pretrain on a folder of images", PretrainConfig, run_pretrain),
    "finetune": ("train a classifier on class folders, from pretrained weights", FinetuneConfig, run_finetune),
    "convert": ("write any checkpoint's weights for another library, verified", ConvertConfig, run_convert),
    "evaluate": ("accuracy of a classifier, k-NN and linear probe of an encoder", EvaluateConfig, run_evaluate),
    "demo": ("draw images and pretrain on them, in about two minutes on a CPU", DemoConfig, run_demo),
    "bench report": ("the suite on this machine, as tables, plots and one HTML page", ReportConfig, run_report),
    "bench gflops": ("multiply-accumulates and parameters, dense and sparse", GflopsConfig, run_gflops),
    "bench throughput": (
        "backend against backend: encoder and whole pretraining step",
        ThroughputConfig,
        run_throughput,
    ),
    "bench scaling": ("cost over mask ratio, image size, batch, threads or model size", ScalingConfig, run_scaling),
    "bench compare": ("whole steps of what one would train instead", CompareConfig, run_compare),
    "bench data": ("decoding and augmentation against torchvision's", DataConfig, run_data),
    "bench kernels": ("each kernel against its reference and against the machine's bounds", KernelsConfig, run_kernels),
    "bench profile": ("where a training step's time goes on the CPU", ProfileConfig, run_profile),
    "info": ("versions, device and usable backends", None, run_info),
}


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag or positional argument a field, inherited ones last; what is not given is left out of the namespace."""
    types_of = typing.get_type_hints(config)
    for f in sorted(fields(config), key=lambda f: f.name not in config.__annotations__):
        kind = types_of[f.name]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        help_text = f.metadata["help"]
        if not any(f.default is silent for silent in (MISSING, None, False)):
            help_text += f" [{'yes' if f.default is True else f.default}]"
        arguments: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction if f.default else "store_true"
        else:
            arguments |= {"type": kind, "choices": f.metadata["choices"]}
        if f.metadata["positional"]:
            parser.add_argument(f.name, metavar=f.name.upper(), **arguments)
            continue
        # --data can be left out of a resumed run, so the command itself asks for it
        required = f.default is MISSING and f.name != "data"
        if kind is not bool and not f.metadata["choices"]:
            arguments["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
        parser.add_argument(flag(f.name), dest=f.name, required=required, **arguments)


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="sparse-fcmae", description="Sparse FCMAE pretraining of ConvNeXt V2.")
    parser.add_argument("--version", action="version", version=f"sparse-fcmae {__version__}")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for name, (what, config, run) in COMMANDS.items():
        *group, leaf = name.split()
        key = " ".join(group)
        if key not in groups:
            above = groups[""].add_parser(key, help="benchmarks", description="Benchmarks.")
            groups[key] = above.add_subparsers(required=True, metavar="BENCHMARK")
        command = groups[key].add_parser(leaf, help=what, description=what[0].upper() + what[1:] + ".")
        if config:
            add_options(command, config)
        command.set_defaults(run=run, parser=command)
    return parser


def stop(message: str) -> NoReturn:
    """Ends with one line and exit code 2."""
    rank = os.environ.get("RANK", "0")
    print(f"sparse-fcmae: {f'[rank {rank}] ' if rank != '0' else ''}{message}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a UserError ends in its one line and exit code 2."""
    namespace, unknown = make_parser().parse_known_args(arguments)
    options = vars(namespace)
    command = options.pop("parser")
    if unknown:
        command.error(f"unknown arguments: {' '.join(unknown)}")
    try:
        options.pop("run")(options)
    except UserError as error:
        stop(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        stop(f"{error.filename}: {error.strerror}")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        stop(f"out of memory, lower --micro-batch-size or --batch-size: {str(error).splitlines()[0]}")
    except (Interrupted, KeyboardInterrupt):
        sys.exit(130)
