"""The command line: one table of commands, each made from the dataclass of its options.

Help and mistyped flags are answered without importing torch: the modules that do the work are imported when it starts.
"""

import argparse
import difflib
import os
import re
import sys
import time
import types
import typing
from dataclasses import MISSING, Field, dataclass, fields
from importlib import import_module
from typing import Any, NoReturn

from sparse_fcmae import __version__
from sparse_fcmae.runtime.errors import Interrupted, UserError
from sparse_fcmae.runtime.options import as_flags, flag, options_of
from sparse_fcmae.runtime.terminal import discard


@dataclass(frozen=True)
class Command:
    """A command: its help, and as "module:name" its options' dataclass and the function that takes them as keywords."""

    help: str
    config: str | None
    run: str

    def options(self) -> dict[str, Field]:
        """The fields of the options' dataclass by name."""
        return {f.name: f for f in fields(load(self.config))} if self.config else {}


COMMANDS = {
    "inspect": Command(
        "what images hold, and what training would see of them",
        "tasks.config:InspectConfig",
        "tasks.inspection:inspect",
    ),
    "pretrain": Command("pretrain on a folder of images", "tasks.config:PretrainConfig", "tasks.pretraining:pretrain"),
    "finetune": Command(
        "train a classifier or a segmentation model, from pretrained weights",
        "tasks.config:FinetuneConfig",
        "tasks.finetuning:finetune",
    ),
    "plan": Command(
        "memory, time, checkpoints and bandwidth that pretraining will take",
        "tasks.config:PlanConfig",
        "tasks.plan:plan",
    ),
    "runs": Command(
        "the runs below a folder, and how far they are", "training.config:RunsConfig", "training.runs:runs"
    ),
    "convert": Command(
        "write any checkpoint's weights for another library, verified",
        "weights.config:ConvertConfig",
        "weights.convert:convert",
    ),
    "evaluate": Command(
        "accuracy of a classifier, mIoU of masks, k-NN and linear probe of an encoder",
        "evaluation.config:EvaluateConfig",
        "evaluation.evaluate:evaluate",
    ),
    "embed": Command(
        "an encoder's features of all images, with a map of them, copies and neighbours",
        "evaluation.config:EmbedConfig",
        "evaluation.embed:embed",
    ),
    "predict": Command(
        "what a classifier says of each image, in a table, or a mask of each",
        "evaluation.config:PredictConfig",
        "evaluation.predict:predict",
    ),
    "reconstruct": Command(
        "pictures of what a pretrained model fills in, of any images and under any mask",
        "evaluation.config:ReconstructConfig",
        "evaluation.reconstruct:draw_reconstructions",
    ),
    "analyze": Command(
        "feature collapse by block, dead channels and the rank of embeddings",
        "evaluation.config:AnalyzeConfig",
        "evaluation.analyze:analyze",
    ),
    "report": Command(
        "one page of a run, or of several beside each other, also while they go on",
        "report.config:ReportConfig",
        "report.report:report",
    ),
    "demo": Command("draw images and pretrain on them, in a few minutes on a CPU", "demo:DemoConfig", "demo:demo"),
    "bench report": Command(
        "the suite on this machine, as tables, plots and one HTML page",
        "benchmarks.config:ReportConfig",
        "benchmarks.report:report",
    ),
    "bench gflops": Command(
        "multiply-accumulates and parameters, dense and sparse",
        "benchmarks.config:GflopsConfig",
        "benchmarks.gflops:gflops",
    ),
    "bench throughput": Command(
        "backend against backend: encoder and whole pretraining step",
        "benchmarks.config:ThroughputConfig",
        "benchmarks.throughput:throughput",
    ),
    "bench scaling": Command(
        "cost over mask ratio, image size, batch, threads or model size",
        "benchmarks.config:ScalingConfig",
        "benchmarks.scaling:scaling",
    ),
    "bench compare": Command(
        "whole steps of what one would train instead", "benchmarks.config:CompareConfig", "benchmarks.compare:compare"
    ),
    "bench data": Command(
        "decoding and augmentation against torchvision's", "benchmarks.config:DataConfig", "benchmarks.data:data"
    ),
    "bench pretrain": Command(
        "pretrain itself, from files on, beside its step and decoding",
        "benchmarks.config:PretrainingConfig",
        "benchmarks.pretraining:pretraining",
    ),
    "bench ablations": Command(
        "what pretraining is worth without GRN, with other masks, with a dense encoder",
        "benchmarks.config:AblationsConfig",
        "benchmarks.ablations:ablations",
    ),
    "bench gpu": Command(
        "all there is to measure on a GPU, in parts, some minutes at a time",
        "benchmarks.config:GpuConfig",
        "benchmarks.gpu:gpu",
    ),
    "bench summary": Command(
        "a table of measured rows, for a document", "benchmarks.config:SummaryConfig", "benchmarks.summary:summary"
    ),
    "bench kernels": Command(
        "each kernel against its reference and against the machine's bounds",
        "benchmarks.config:KernelsConfig",
        "benchmarks.kernels:kernels",
    ),
    "bench profile": Command(
        "where a training step's time goes on the CPU",
        "benchmarks.config:ProfileConfig",
        "benchmarks.profile:profile_step",
    ),
    "info": Command("versions, device and usable backends", None, "info:info"),
}
GROUPS = {"bench": "benchmarks"}
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
OTHERS_WAIT = 3.0  # seconds
SPINS = 2000  # of a waiting thread before it sleeps: a tenth of a millisecond or so


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, and takes no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"-[\d.]")  # so that "-1000,1000" is a value too, and no flag

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Once(argparse.Action):
    """Takes a flag's value, or of a flag without one whether it is on, and refuses the flag when it comes again."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, given: str | None = None) -> None:
        if hasattr(namespace, self.dest):
            parser.error(f"{flag(self.dest)} is given twice")
        if self.nargs == "+" and len(values) == 1:
            (values,) = values
        on_or_off = self.nargs == 0
        setattr(namespace, self.dest, not given.startswith("--no-") if on_or_off and given else values)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A mistake of the user's ends in one line and exit code 2, without a traceback."""
    spin_briefly()
    command, options = parse(sys.argv[1:] if arguments is None else arguments)
    code = run(command, options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        load("runtime.distributed:end_process")(code)
    if code:
        sys.exit(code)


def run(command: Command, options: dict[str, Any]) -> int:
    """Runs a command and returns the exit code. A mistake is said in one line."""
    try:
        result = load(command.run)(**options)
        if isinstance(result, str):
            print(result)
        return 0
    except UserError as error:
        return say(as_flags(str(error), command.options()))
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        discard(sys.stdout)
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return say(f"{error.filename}: {error.strerror}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        smaller = [flag(name) for name in ("micro_batch_size", "batch_size", "image_size") if name in command.options()]
        return say(f"out of memory, lower {' or '.join(smaller) or 'what is asked for'}: {str(error).splitlines()[0]}")
    except Interrupted:
        return TRY_AGAIN
    except KeyboardInterrupt:
        return 130


def parse(arguments: list[str]) -> tuple[Command, dict[str, Any]]:
    """The command that the arguments name, and the options that they give. A mistake ends in one line."""
    parser = make_parser(arguments)
    if near := unknown_command(arguments):
        parser.error(near)
    namespace, unknown = parser.parse_known_args(arguments)
    options = vars(namespace)
    command, parser = options.pop("command"), options.pop("parser")
    if unknown:
        parser.error(unknown_arguments(unknown, parser))
    for name, f in command.options().items():
        if f.default is MISSING and name not in options:
            parser.error(f"{flag(name)} is missing: {as_flags(f.metadata['help'], command.options())}")
    return command, options


def make_parser(arguments: list[str]) -> Parser:
    """The whole command line, with the flags of the one command that the arguments name."""
    parser = Parser(prog="sparse-fcmae", description="Sparse FCMAE pretraining of ConvNeXt V2.")
    parser.add_argument("--version", action="version", version=f"sparse-fcmae {__version__}")
    subparsers = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for group, text in GROUPS.items():
        of_group = subparsers[""].add_parser(group, help=text, description=f"{text.capitalize()}.")
        subparsers[group] = of_group.add_subparsers(required=True, metavar="NAME")
    for name, command in COMMANDS.items():
        group, _, leaf = name.rpartition(" ")
        description = f"{command.help[0].upper()}{command.help[1:]}."
        of_command = subparsers[group].add_parser(leaf, help=command.help, description=description)
        of_command.set_defaults(command=command, parser=of_command)
        if command.config and arguments[: len(name.split())] == name.split():
            add_options(of_command, load(command.config))
    return parser


def add_options(parser: Parser, config: type) -> None:
    """A flag or positional argument for each field. What is not given is not in the namespace."""
    kinds = typing.get_type_hints(config)
    for f in options_of(config):
        kind, several = kinds[f.name], tuple[str, ...] in typing.get_args(kinds[f.name])
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        text = as_flags(f.metadata["help"], kinds)
        if not any(f.default is silent for silent in (MISSING, None, False)):
            text += f" [{'yes' if f.default is True else f.default}]"
        settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS, "action": Once}
        if f.metadata["value_optional"]:
            named = [choice for choice in f.metadata["choices"] if isinstance(choice, str)]
            settings |= {"nargs": "?", "const": True, "choices": named, "metavar": "|".join(named)}
        elif kind is bool:
            settings["nargs"] = 0
        elif several:
            settings |= {"nargs": "+", "metavar": "PATH"}
        else:
            settings["type"], settings["choices"] = kind, f.metadata["choices"]
            if not f.metadata["choices"]:
                settings["metavar"] = {int: "N", float: "X"}.get(kind, "PATH" if f.metadata["path"] else "TEXT")
        if f.metadata["positional"]:
            settings |= {} if f.default is MISSING else {"nargs": "?"}
            parser.add_argument(f.name, **settings | {"metavar": f.name.upper()})
            continue
        names = [flag(f.name)]
        if kind is bool and (f.default is not False or f.metadata["resumable"]):
            names.append("--no-" + names[0].removeprefix("--"))
        parser.add_argument(*names, dest=f.name, **settings)


def unknown_command(arguments: list[str]) -> str | None:
    """What is wrong where there is no command of the name given but a similar one; None in all other cases."""
    words = arguments[: 2 if arguments[:1] and arguments[0] in GROUPS else 1]
    given, known = " ".join(words), [*COMMANDS, *GROUPS]
    if not words or given in known or words[-1].startswith("-"):
        return None
    of_group = [name for name in known if len(words) == 1 or name.startswith(f"{words[0]} ")]
    leaf = lambda name: name.split()[-1] if len(words) == 2 else name  # noqa: E731
    near = difflib.get_close_matches(words[-1], map(leaf, of_group), 1)
    return f"there is no command {given}; is {' '.join([*words[:-1], *near])} meant?" if near else None


def unknown_arguments(unknown: list[str], parser: Parser) -> str:
    """What is wrong with arguments that no flag takes, and the flag that may be meant."""
    known = [name for action in parser._actions for name in action.option_strings]
    given = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
    if os.path.exists(given) and "--data" in known:
        return f"unknown arguments: {' '.join(unknown)}; is --data {given} meant?"
    near = [name for name in known if name.startswith(given)] or difflib.get_close_matches(given, known)
    return f"unknown arguments: {' '.join(unknown)}" + (f"; is {near[0]} meant?" if near else "")


def spin_briefly() -> None:
    """Has OpenMP's threads sleep after a short while of waiting, unless the user has said how they shall wait.

    By default they spin for milliseconds, and a run takes ten times as long beside another busy process. Sleeping at
    once would cost a run that is alone a few per cent. GNU's OpenMP runtime reads this when torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def load(place: str) -> Any:
    """What "module:name" names in this package."""
    module, name = place.split(":")
    return getattr(import_module(f"sparse_fcmae.{module}"), name)


def say(message: str) -> int:
    """Prints what is wrong in one line, and returns exit code 2.

    Of several processes the first says it. Another one waits, as torchrun ends it if the first has said the same.
    """
    if "tqdm" in sys.modules:  # a bar that the mistake has left would stand in front of it
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHERS_WAIT)
    print(f"sparse-fcmae: {f'[rank {rank}] ' if rank != '0' else ''}{message}", file=sys.stderr)
    return 2
