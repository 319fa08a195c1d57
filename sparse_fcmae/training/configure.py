"""From the options that a user gives to the checked config of a run, new or resumed."""

import os
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import read_json, read_toml
from sparse_fcmae.runtime.options import check, check_paths, differences, image_size_of, shown_size
from sparse_fcmae.runtime.run_folder import RunFolder
from sparse_fcmae.training.config import OF_WEIGHTS, RunConfig

Config = TypeVar("Config", bound=RunConfig)


def configure(kind: type[Config], given: dict[str, Any]) -> Config:
    """The config of a class that options mean. Nothing on the disk is touched.

    With resume=True an option that is not given has the value in the run's folder. resume="auto" means that where there
    is a run in it, and else False. Raises UserError for values out of range, and for a folder that can't be used as
    asked.
    """
    of_file, given = _of_file(kind, given), {name: value for name, value in given.items() if name != "config"}
    given = {name: value for name, value in of_file.items() if name not in _displaced(given)} | given
    check_paths(kind, given)
    options = _written_out(kind, given)
    try:
        os.fspath(options.get("out", "")).encode()
    except UnicodeEncodeError:  # safetensors could not write there at the end
        raise UserError("`out` must be named in UTF-8: choose another") from None
    run = RunFolder(options.get("out", kind.out), kind.kind)
    if options.get("resume") == "auto" and run.saved_options() is None:
        options["resume"] = False
    run.check(options.get("resume", False), options.get("overwrite", False))
    if options.get("resume"):
        config = _resumed(kind, options, run)
    elif not options.get("data"):
        raise UserError("`data` is missing: name the folder with the images")
    else:
        config = kind(**options)
    check(config)
    weights = Path(config.init or "").resolve()
    if config.init and config.overwrite and weights.is_relative_to(Path(config.out).resolve()):
        raise UserError(f"`init` {config.init} lies in `out`, which `overwrite=True` deletes: choose another `out`")
    return config


def _of_file(kind: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """The options in the file that `config` names, TOML or JSON, as a run's own config.json has them.

    Raises UserError where it can't be read, and for a name that is no option.
    """
    if given.get("config") is None:
        return {}
    path = Path(given["config"])
    if path.suffix.lower() not in (".toml", ".json"):
        raise UserError(f"`config` {path} is neither a .toml nor a .json file: write the options as one of them")
    found = read_toml(path) if path.suffix.lower() == ".toml" else read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"`config` {path} holds no options by their names")
    found = {name.replace("-", "_"): value for name, value in found.items()}
    made = found.pop("format", None)
    if made not in (None, RunFolder(path.parent, kind.kind).format):
        raise UserError(f"`config` {path} is of a {made}, and this is {kind.kind}")
    if made:  # a run's, which has more than options, and its own folder
        found = {name: value for name, value in found.items() if name in {f.name for f in fields(kind)} - {"out"}}
    known = [f.name for f in fields(kind)]
    if unknown := sorted(found.keys() - set(known)):
        near = get_close_matches(unknown[0], known, 1)
        raise UserError(
            f"`config` {path}: there is no option {unknown[0]}" + (f"; is {near[0]} meant?" if near else "")
        )
    return found


def _displaced(options: dict[str, Any]) -> list[str]:
    """The options that mean nothing beside these, unless they are given with them."""
    pairs = {"lr": "base_lr", "base_lr": "lr", "epochs": "max_steps"}
    return [other for one, other in pairs.items() if one in options and other not in options]


def _written_out(kind: type[Config], given: dict[str, Any]) -> dict[str, Any]:
    """The options in the form in which config.json has them: paths absolute, so that any folder can be resumed from."""
    options = dict(given)
    if options.get("image_size") is not None:
        options["image_size"] = shown_size(image_size_of(options["image_size"]))
    for f in fields(kind):
        if f.metadata.get("path") and f.name != "out" and options.get(f.name):
            given, several = options[f.name], isinstance(options[f.name], list | tuple)
            options[f.name] = [absolute(path) for path in given] if several else absolute(given)
    return options


def absolute(path: str) -> str:
    """A path from the root; an address, such as s3://bucket/folder, as it is."""
    return path if "://" in path else os.path.abspath(path)


def _resumed(kind: type[Config], options: dict[str, Any], run: RunFolder) -> Config:
    """The saved options with what is given in their place. Raises UserError where that would be another run."""
    known = {f.name for f in fields(kind)}
    saved = kind(**{name: value for name, value in (run.saved_options() or {}).items() if name in known})
    if options.get("dtype") == "auto":  # a run stays with the dtype it was started with
        options = {name: value for name, value in options.items() if name != "dtype"}
    config = replace(saved, **dict.fromkeys(_displaced(options)) | options)
    for name in differences(config, saved):
        from_weights = "" if name in (*OF_WEIGHTS, "init") else f" from its weights with `init={config.out}`"
        here, there = ("none" if value is None else value for value in (getattr(config, name), getattr(saved, name)))
        raise UserError(
            f"`{name}` is {here} but the run in {config.out} has {there}: leave it out to resume, or start another "
            f"run{from_weights} with another `out`"
        )
    return config
