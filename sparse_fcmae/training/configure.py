"""From the options that a user gives to the checked config of a run, new or resumed."""

import math
import os
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from sparse_fcmae.config import RunConfig, flag, image_size_of, shown_size
from sparse_fcmae.errors import UserError
from sparse_fcmae.training.checkpoint import RunFolder, check_same

Config = TypeVar("Config", bound=RunConfig)
PATHS = ("data", "init", "knn")  # made absolute, so that a run can be resumed from any folder


def configure(
    kind: type[Config], options: dict[str, Any], positive: Iterable[str], not_negative: Iterable[str]
) -> Config:
    """The config of a class that options mean; touches nothing on the disk.

    With resume=True what is left out is as in the run's folder. positive, not_negative: options whose values, where
    they are given, have to be so. Raises UserError for values that are not, and for a folder that can't be used.
    """
    known = [f.name for f in fields(kind)]
    for name in options.keys() - set(known):
        raise TypeError(f"{name!r} is an unexpected option of {kind.command}")
    options = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in options.items()}
    if options.get("image_size") is not None:
        options["image_size"] = shown_size(image_size_of(options["image_size"]))
    options |= {name: os.path.abspath(options[name]) for name in PATHS if options.get(name)}
    resume = options.get("resume", False)
    run = RunFolder(options.get("out", kind.out), kind)
    run.check(resume, options.get("overwrite", False))
    if resume:
        saved = kind(**{k: v for k, v in (run.saved_config() or {}).items() if k in known})
        if options.get("dtype") == "auto":  # a run stays with what it was started with
            del options["dtype"]
        config = replace(saved, **options)
        check_same(config, saved)
    elif "data" not in options:
        raise UserError("--data is missing: name the folder with the images")
    else:
        config = kind(**options)
    source = Path(config.init or "").resolve()
    if config.init and config.overwrite and source.is_relative_to(Path(config.out).resolve()):
        raise UserError(f"--init {config.init} lies in --out, which --overwrite deletes: choose another --out")
    check_values(config, positive, not_negative)
    return config


def check_values(config: Any, positive: Iterable[str], not_negative: Iterable[str]) -> None:
    """Raises UserError where an option of these is given but not so."""
    for name in positive:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} must be greater than 0, not {value}")
    for name in not_negative:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 2**32:
            raise UserError(f"{flag(name)} must be 0 or more, not {value}")
