"""The layers of the package: what may import what, and what is loaded when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_fcmae
from sparse_fcmae.cli import COMMANDS

ROOT = Path(__file__).parent.parent
LAYERS = [  # from the ground up: a layer imports from itself and from those before it
    {"runtime"},
    {"kernels"},
    {"ops"},
    {"backends"},
    {"model", "data"},
    {"weights"},
    {"training", "evaluation"},
    {"tasks", "benchmarks", "report"},
    {"demo", "info", "cli", "__main__"},
]
APART = [
    ("model", "data"),
    ("training", "evaluation"),
    ("evaluation", "training"),
    ("tasks", "benchmarks"),
    ("report", "tasks"),
    ("tasks", "report"),
]
FILES = {"sparse_fcmae": ROOT / "sparse_fcmae", "kernels": ROOT / "kernels", "benchmarks": ROOT / "benchmarks"}


def layer(wing):
    return next(number for number, wings in enumerate(LAYERS) if wing in wings)


def imports():
    """(file, its wing, the wing that it imports from) for every import within the package, those in functions too."""
    for folder, root in FILES.items():
        for file in sorted(root.rglob("*.py")):
            place = file.relative_to(root).parts
            wing = folder if folder != "sparse_fcmae" else Path(place[0]).stem
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("sparse_fcmae"):
                    continue
                inner = node.module.split(".")[1:]
                for target in [inner[0]] if inner else [alias.name for alias in node.names]:
                    yield file.relative_to(ROOT), wing, target


def test_imports_point_one_way():
    found = [(f, a, b) for f, a, b in imports() if a != "__init__" and b not in ("__version__", "__main__")]
    assert len(found) > 100
    assert {b for _, _, b in found} <= {wing for wings in LAYERS for wing in wings}
    upward = [f"{f} imports from {b}" for f, a, b in found if layer(b) > layer(a)]
    assert not upward
    across = [f"{f} imports from {b}" for f, a, b in found if (a, b) in APART]
    assert not across


def run(program):
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--x"], *([*name.split(), "--help"] for name in COMMANDS)]
)
def test_help_and_mistyped_flags_are_answered_without_torch(arguments):
    program = f"""
import sys
from sparse_fcmae.cli import main
try:
    main({arguments!r})
except SystemExit:
    assert "torch" not in sys.modules
    print("\\nanswered")
"""
    assert run(program).endswith("answered\n")


def test_importing_the_package_loads_what_is_used():
    assert run("import sys, sparse_fcmae; print('torch' in sys.modules)") == "False\n"
    assert run("import sys, sparse_fcmae; sparse_fcmae.create_encoder; print('PIL' in sys.modules)") == "False\n"
    assert run("import sys, sparse_fcmae; sparse_fcmae.pretrain; print('torch._dynamo' in sys.modules)") == "False\n"


def test_public_names_are_there_for_editors_too():
    tree = ast.parse((ROOT / "sparse_fcmae" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    assert shown == {name: f"sparse_fcmae.{module}" for name, module in sparse_fcmae.PUBLIC.items()}
    for name in sparse_fcmae.__all__:
        assert getattr(sparse_fcmae, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        sparse_fcmae.pretrian  # noqa: B018
