"""The wheel: built under isolation, with and without a compiler, used from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparse_fcmae.kernels.cpu import library

ROOT = Path(__file__).parent.parent
USE = """
import torch, sparse_fcmae
assert sparse_fcmae.__file__.startswith({target!r}), sparse_fcmae.__file__
print(sparse_fcmae.available_backends("cpu")["native"])
for _ in range(2):
    sparse_fcmae.create_encoder("atto")(torch.randn(1, 3, 32, 32))
"""


def build_and_use(folder, environment):
    """The wheel's files, and what using it prints to stdout and stderr."""
    source, target = folder / "source", folder / "target"
    archive = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in archive.stdout.decode().split("\0")[:-1]:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    environment = os.environ | environment
    wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(wheel, check=True, env=environment, capture_output=True)
    (file,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, file], check=True)
    program = [sys.executable, "-c", USE.format(target=str(target))]
    used = subprocess.run(
        program, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    return zipfile.ZipFile(file).namelist(), used.stdout.splitlines(), used.stderr.splitlines()


def test_wheel_has_the_kernels_and_no_top_level_strangers(tmp_path):
    names, output, errors = build_and_use(tmp_path, {})
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sparse_fcmae"}
    for kernel in library.SETS if os.uname().machine == "x86_64" else ("baseline",):
        assert f"sparse_fcmae/kernels/cpu/_{kernel}.abi3.so" in names
    assert "sparse_fcmae/benchmarks/throughput.py" in names
    assert {f"sparse_fcmae/report/page.{kind}" for kind in ("css", "html", "js")} <= set(names)
    assert "sparse_fcmae/evaluation/imagenet_wordnet_ids.txt" in names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert (output, errors) == (["None"], [])


@pytest.mark.slow
def test_a_type_checker_understands_the_public_names():
    strict = ["--strict", "--follow-imports=silent", "--cache-dir", os.devnull]
    program = [sys.executable, "-m", "mypy", *strict, "tests/typed_use.py"]
    checked = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_wheel_built_without_a_compiler_serves_the_torch_backend(tmp_path):
    names, output, errors = build_and_use(tmp_path, {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"})
    assert not [name for name in names if name.endswith(".so")]
    reason = "the C++ kernels were not built (no C++20 compiler when sparse-fcmae was installed)"
    assert (output, errors) == ([reason], [f"sparse-fcmae: using the slower torch backend: {reason}"])


KERNEL_TESTS = """
import pytest, sys
from sparse_fcmae.kernels.cpu import library
library.SETS[:] = ["{name}"] * 4
assert library.instruction_set() == "{name}"
files = ("block_dwconv", "convnext_block", "gelu_grn", "layer_norm")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *(f"ops/test_{{file}}.py" for file in files)]))
"""


@pytest.mark.parametrize("name", library.SETS[library.SETS.index(library.instruction_set() or "baseline") + 1 :])
def test_kernels_of_lesser_instruction_sets(name):
    program = [sys.executable, "-c", KERNEL_TESTS.format(name=name)]
    result = subprocess.run(program, cwd=ROOT / "tests", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(not shutil.which("objdump") or os.uname().machine != "x86_64", reason="needs objdump on x86-64")
def test_every_build_has_the_instructions_of_its_name_and_no_others():
    marks = {"avx2": "%ymm", "avx512": "%zmm", "avx512_bf16": "vcvtneps2bf16"}
    for i, name in enumerate(reversed(library.SETS)):
        (file,) = (ROOT / "kernels" / "cpu").glob(f"_{name}.*.so")
        code = subprocess.run(["objdump", "-d", file], check=True, capture_output=True, text=True).stdout
        assert [mark in code for mark in marks.values()] == [i > j for j in range(3)], name


def test_a_lesser_build_serves_where_the_best_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    shutil.copy(next((ROOT / "kernels" / "cpu").glob("_baseline.*.so")), tmp_path)
    (tmp_path / "_avx2.abi3.so").write_text("no library")
    library._load.cache_clear()
    assert library.instruction_set() == "baseline"
    next(tmp_path.glob("_baseline.*")).unlink()
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    shutil.copy(next((ROOT / "kernels" / "cpu").glob("_avx2.*.so")), tmp_path / "_baseline.abi3.so")
    library._load.cache_clear()
    assert "are of another version or CPU" in library.unusable()
    (tmp_path / "_baseline.abi3.so").unlink()
    library._load.cache_clear()
    assert library.unusable().startswith("the C++ kernels can't be loaded")
    monkeypatch.undo()
    library._load.cache_clear()
    assert library.unusable() is None
