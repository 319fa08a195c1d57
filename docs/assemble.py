"""Puts the pages of the site into build/docs: those that are written, and three that are read off the code.

The written ones keep their places to each other, so that their links hold in the repository and on the site alike.
"""

import ast
import shutil
from dataclasses import MISSING
from pathlib import Path

from sparse_fcmae import PUBLIC
from sparse_fcmae.cli import COMMANDS, load
from sparse_fcmae.runtime.options import as_flags, flag, options_of

ROOT = Path(__file__).parents[1]
WRITTEN = ("docs", "examples", "benchmarks/README.md", "benchmarks/results", "CHANGELOG.md", "CONTRIBUTING.md")
AREAS = {  # of the package, as the page of errors has them
    "cli.py": "The command line",
    "runtime": "Options, files, devices",
    "data": "Images, tables and archives",
    "tasks": "What is trained",
    "training": "Runs",
    "model": "The network",
    "weights": "Checkpoints",
    "evaluation": "Features, predictions, evaluation",
    "report": "Pages of runs",
    "backends": "Backends",
    "kernels": "Kernels",
    "benchmarks": "Benchmarks",
}


def assemble(out: Path) -> None:
    """Fills the folder `out` anew."""
    shutil.rmtree(out, ignore_errors=True)
    for name in WRITTEN:
        source, place = ROOT / name, out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("assemble.py", "__pycache__"))
        else:
            shutil.copy(source, place)
    shutil.copy(ROOT / "README.md", out / "index.md")
    for name, page in (("commands", commands()), ("python", python()), ("errors", errors())):
        (out / f"{name}.md").write_text(page, encoding="utf-8")


def commands() -> str:
    """Each command with its options, from the table of the command line."""
    parts = ["# Commands", "`sparse-fcmae COMMAND --help` says the same."]
    for name, command in COMMANDS.items():
        parts += [f"## {name}", f"{command.help[0].upper()}{command.help[1:]}."]
        rows = []
        for f in options_of(load(command.config)) if command.config else ():
            shown = f.name.upper() if f.metadata["positional"] else flag(f.name)
            default = "" if f.default is MISSING or f.default in (None, False) else str(f.default)
            if f.default is True:
                default = "yes"
            choices = [choice for choice in f.metadata["choices"] or () if isinstance(choice, str)]
            help = as_flags(f.metadata["help"], [f.name for f in options_of(load(command.config))])
            help += f" ({', '.join(choices)})" if choices else ""
            rows.append(f"| `{shown}` | {cell(help)} | {cell(default)} |")
        parts += ["\n".join(["| option | what it is | default |", "|---|---|---|", *rows])] if rows else []
    return "\n\n".join(parts) + "\n"


def python() -> str:
    """The names that the package exports, described by their docstrings."""
    entries = [f"::: sparse_fcmae.{module}.{name}" for name, module in PUBLIC.items()]
    return "\n\n".join(["# Python", "All names are imported from `sparse_fcmae` itself.", *entries]) + "\n"


def errors() -> str:
    """The lines in which mistakes are told, from wherever the code raises a UserError."""
    parts = [
        "# Errors and remedies",
        "A mistake ends in one line that says what to do, with exit code 2, and leaves the disk as it was. These are "
        "the lines, as the code has them. Capitals and `...` stand for a name, a number or a list. On the command "
        "line `argument=value` reads `--argument value`.",
    ]
    for area, title in AREAS.items():
        folder = ROOT / (area if area in ("kernels", "benchmarks") else f"sparse_fcmae/{area}")
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
        lines = sorted({line for file in files for line in messages(ast.parse(file.read_text(encoding="utf-8")))})
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def messages(tree: ast.AST) -> list[str]:
    """The texts of the mistakes that a module tells, "..." for what is known only when it runs."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    kinds = ("UserError", "Diverged", "parser.error")
    found = [text_of(call.args[0]) for call in calls if ast.unparse(call.func) in kinds]
    return [line for line in found if any(letter.isalpha() for letter in line)]


def text_of(node: ast.expr) -> str:
    """The text that an expression gives, as far as it stands there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("<", "&lt;").replace("*", "\\*").strip()
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else place_of(part.value) for part in node.values]
        return text_of(ast.Constant("".join(parts)))
    if isinstance(node, ast.BinOp):
        return f"{text_of(node.left)} {text_of(node.right)}"
    return "..."


def place_of(node: ast.expr) -> str:
    """What stands for a value in a text: its name in capitals, where it has one."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.strip("_").upper() or "..."


def cell(text: str) -> str:
    """A text that may stand in a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    assemble(ROOT / "build" / "docs")
