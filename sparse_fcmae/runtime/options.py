"""Options as fields of dataclasses: declared once, with help, choices and range, for Python and the command line.

A config is a frozen dataclass whose fields are made by `option`. The command line makes a flag of each field, `check`
refuses values outside the declared range, and `keywords_of` gives a function the config's fields as its keywords. Help
names other options in backticks, as the messages of a UserError do.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import wraps
from numbers import Integral, Real
from shlex import quote
from types import NoneType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from sparse_fcmae.runtime.errors import UserError

P = ParamSpec("P")
Result = TypeVar("Result")
Config = TypeVar("Config")
ARGUMENT = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")  # as in the messages of a UserError
IN_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
LARGEST = 2**32  # below which whole numbers are
BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "above": (lambda value, bound: value > bound, "greater than"),
    "at_least": (lambda value, bound: value >= bound, "at least"),
    "below": (lambda value, bound: value < bound, "less than"),
    "at_most": (lambda value, bound: value <= bound, "at most"),
}


def option(
    default: Any = MISSING,
    *,
    help: str,
    choices: tuple[Any, ...] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    path: bool = False,
    resumable: bool = False,
    changes_run: bool = False,
    positional: bool = False,
    value_optional: bool = False,
) -> Any:
    """A dataclass field that is an option.

    help: what the flag's help says. choices, above, at_least, below, at_most: which values `check` accepts. path: the
    value names a file or folder. resumable: the value may differ when a run is resumed. changes_run: it may differ, but
    then the run is another one from there on, which its log says. positional: an argument of the command line without a
    flag. value_optional: the flag may stand alone, for True.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {
        "help": help,
        "choices": choices,
        "bounds": {k: v for k, v in bounds.items() if v is not None},
        "path": path,
        "resumable": resumable or changes_run,
        "changes_run": changes_run,
        "positional": positional,
        "value_optional": value_optional,
    }
    return field(default=default, metadata=metadata)


def option_of(config: type, name: str) -> Any:
    """A dataclass field that is the same option as another config has."""
    known = {f.name: f for f in fields(config)}[name]
    return field(default=known.default, metadata=known.metadata)


def seed_option(help: str) -> Any:
    """The option of a seed. help: what is drawn from it."""
    return option(0, help=help, at_least=0, below=2**32)


def options_of(config: type) -> list[Field]:
    """The fields of a config in the order in which they are shown: inherited ones last."""
    return sorted(fields(config), key=lambda f: f.name not in config.__annotations__)


def all_paths(value: Any) -> bool:
    """Whether a value is a path or several ones."""
    return all(isinstance(path, str | os.PathLike) for path in (value if isinstance(value, list | tuple) else [value]))


def paths_of(value: Any) -> list[str]:
    """A path, or several ones, as a list of texts."""
    return [os.fspath(path) for path in (value if isinstance(value, list | tuple) else [value])]


def check_paths(kind: type, options: dict[str, Any]) -> None:
    """Raises UserError for the first option of a config's class that is to name files or folders, and is no path."""
    for f in fields(kind):
        value = options.get(f.name)
        if f.metadata.get("path") and isinstance(value, str) and not value:
            raise UserError(f"`{f.name}` is empty: name a file or folder, or leave it out")
        if f.metadata.get("path") and value is not None and not all_paths(value):
            raise UserError(f"`{f.name}` is of the type {type(value).__name__}: give a path")


def check_given(options: dict[str, Any], what: dict[str, str]) -> None:
    """Raises UserError for the first of some options that is not given. what: by its name, what it names."""
    for name, meaning in what.items():
        if not options.get(name):
            raise UserError(f"`{name}` is missing: name {meaning}")


def check_unused(config: Any, names: Iterable[str], why: str) -> None:
    """Raises UserError for the first of these options that has another value than its default. why: what is wrong."""
    defaults = {f.name: f.default for f in fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise UserError(f"`{name}` {why}")


def check(config: Any) -> None:
    """Raises UserError for the first option of another type, not finite, not among its choices, or out of bounds.

    A path may be anything that stands for one.
    """
    kinds = get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None:
            continue
        allowed = get_args(kinds[f.name]) or (kinds[f.name],)
        if not f.metadata["path"] and not any(_is_of(value, kind) for kind in allowed):
            known = [IN_WORDS.get(kind, "several") for kind in allowed if kind is not NoneType]
            words = " or ".join(dict.fromkeys(known))
            raise UserError(f"`{f.name}` must be {words}, not {value!r}")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"`{f.name}` {value}: choose one of {', '.join(map(str, choices))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"`{f.name}` must be a finite number, not {value}")
        for name, bound in f.metadata["bounds"].items():
            holds, words = BOUNDS[name]
            if not holds(value, bound):
                raise UserError(f"`{f.name}` must be {words} {bound}, not {value}")
        if isinstance(value, Integral) and abs(value) >= LARGEST:
            raise UserError(f"`{f.name}` must be less than {LARGEST}, not {value}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type, or as good: a number for its text, a list for a tuple."""
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is_of(part, get_args(kind)[0]) for part in value)
    as_good = {int: Integral, float: Real, str: str | Real}.get(kind, kind)
    return isinstance(value, as_good) and (kind is bool or not isinstance(value, bool))


def keywords_of(config: Callable[P, Config]) -> Callable[[Callable[[dict[str, Any]], Result]], Callable[P, Result]]:
    """Has a function of the given options take them as keywords, which are the fields of `config`.

    Editors and `help` show each with its type and default; a path may be a path object too. The function gets a dict of
    those that the caller gave, with path objects as strings. Raises TypeError for a keyword that is no field.
    """

    def decorate(function: Callable[[dict[str, Any]], Result]) -> Callable[P, Result]:
        signature = inspect.signature(config)
        shown = options_of(config)  # type: ignore[arg-type]
        helps = "\n".join(f"    {f.name}: {f.metadata['help']}" for f in shown)

        @wraps(function)
        def accept(*arguments: P.args, **given: P.kwargs) -> Result:
            bound = signature.bind_partial(*arguments, **given)
            return function({k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in bound.arguments.items()})

        parameters = [
            p.replace(annotation=p.annotation | os.PathLike) if f.metadata["path"] else p
            for f, p in ((f, signature.parameters[f.name]) for f in shown)
        ]
        result = inspect.signature(function).return_annotation
        accept.__signature__ = signature.replace(parameters=parameters, return_annotation=result)
        accept.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{helps}\n"
        return accept

    return decorate


def flag(name: str) -> str:
    """The command line's flag of an option: "--kebab-case"."""
    return "--" + name.replace("_", "-")


def given_flags(config: Any, kind: type) -> str:
    """The flags of the options of `kind` in which a config is not the default, for a shell, each after a space."""
    words: list[str] = []
    for f in fields(kind):
        value = getattr(config, f.name)
        if value != f.default:
            words += [flag(f.name), *map(str, value if isinstance(value, list | tuple) else [value])]
    return "".join(f" {quote(word)}" for word in words)


def as_flags(message: str, names: Iterable[str]) -> str:
    """The message of a UserError as the command line shows it, with the arguments of these names as flags."""
    known = set(names)

    def replace(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in known:
            return match[0]
        if value == "False":
            return flag(f"no_{name}")
        return flag(name) if value in (None, "True") else f"{flag(name)} {value}"

    return ARGUMENT.sub(replace, message)


def differences(a: Any, b: Any) -> list[str]:
    """The names of the options in which two configs differ, without those that may differ when a run is resumed."""
    return [f.name for f in fields(a) if not f.metadata["resumable"] and getattr(a, f.name) != getattr(b, f.name)]


def changes(before: dict[str, Any], config: Any) -> list[str]:
    """A line for each option that changes the run that is resumed. before: the options that it had."""
    lines = []
    for f in fields(config):
        now, then = getattr(config, f.name), before.get(f.name)
        if f.metadata["changes_run"] and f.name in before and now != then:
            lines.append(f"changed from here on: {flag(f.name)} {_shown(now)}, which was {_shown(then)}")
    return lines


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def shown_size(size: tuple[int, int]) -> str:
    """(height, width) as an option has it: "224", or "224x320"."""
    return "x".join(map(str, dict.fromkeys(size)))


def image_size_of(value: str | int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of 224, "224", "224x320" or (224, 320)."""
    if isinstance(value, int):
        value = (value,)
    try:
        sides = [int(side) for side in (value.lower().split("x") if isinstance(value, str) else value)]
        height, width = sides * 2 if len(sides) == 1 else sides
    except (TypeError, ValueError):
        raise UserError(f"`image_size` {value}: give pixels as 224 or, height first, 224x320") from None
    return height, width


def listed(name: str, value: Any, kind: Callable[[str], Any], known: Iterable[str] | None = None) -> list[Any]:
    """The parts of an option that is a list with commas, without repetition.

    Raises UserError where a part is not of its kind, or not one of those known.
    """
    try:
        parts = [kind(part.strip()) for part in str(value).split(",") if part.strip()]
    except ValueError:
        raise UserError(f"`{name}` {value}: give numbers with commas between them") from None
    if unknown := [part for part in parts if known is not None and part not in known]:
        raise UserError(f"unknown {name.replace('_', ' ')} {unknown[0]!r}: choose of {', '.join(map(str, known))}")
    if not parts:
        raise UserError(f"`{name}` is empty: give at least one")
    return list(dict.fromkeys(parts))
