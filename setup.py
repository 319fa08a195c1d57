"""Builds the C++ kernels, one library per instruction set, as optional extensions; all else is in pyproject.toml.

The libraries have a plain C ABI and are loaded with ctypes, so neither torch nor its headers are needed to build them
and one wheel serves every torch version. Where no compiler exists the package installs without them.
"""

import copy
import platform
import runpy
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
    }

CONSTANTS = runpy.run_path("kernels/constants.py")["CXX_FLAGS"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none: one thread there


class BuildApart(build_ext):
    """Gives every extension its own folder of object files: they are built of the same sources at the same time."""

    def build_extension(self, ext: Extension) -> None:
        apart = copy.copy(self)
        apart.build_temp = f"{self.build_temp}/{ext.name}"
        build_ext.build_extension(apart, ext)


setup(
    cmdclass={"build_ext": BuildApart},
    package_dir={"sparse_fcmae.kernels": "kernels", "sparse_fcmae.benchmarks": "benchmarks"},
    ext_modules=[
        Extension(
            f"sparse_fcmae.kernels.cpu._{name}",
            sources=sorted(glob("kernels/cpu/*.cpp")),
            depends=[*glob("kernels/cpu/*.h"), "kernels/constants.py"],
            extra_compile_args=["-O3", "-std=c++20", "-Wno-psabi", "-g0", *CONSTANTS, *OPENMP, *flags],
            extra_link_args=OPENMP,
            py_limited_api=True,
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build_ext": {"parallel": 2}},
)
