"""Compiles every Triton kernel with every tile that may be timed, without a GPU, and says what it takes.

python tests/kernels/ahead_of_time.py CAPABILITY MODEL...

prints a JSON list of kernels, tiles, registers and spilled bytes.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_fcmae.kernels.triton.patch_errors import BLOCK, WARPS
from sparse_fcmae.model.convnext import SIZES

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {"patch_to_row": "*i32", "row_to_patch": "*i64", "offsets": "*i64"} | dict.fromkeys(
    ("blocks", "first", "rows", "cols", "positions", "per_program", "programs", "magnitude"), "i32"
)
OF_PIXELS = {"pixels": "*u8", "statistics": "*fp64", "rows": "*i64"} | dict.fromkeys(
    ("image", "channel", "row", "column"), "i32"
)
STORED = {"u8": (False, False), "fp32": (True, False), "i32": (False, True)}  # dtypes: CAN_MISS, WIDE

CONVOLUTIONS = (  # what is None, what is bfloat16: forward pass of a block, its gradient; with neither norm nor sum
    (("residual",), ["out"]),
    (("bias", "convolved", "norm_weight", "norm_bias"), []),
    (("residual", "convolved", "norm_weight", "norm_bias"), []),
)

# module, kernel, its constants, which tensors are bfloat16, of what types others are
Case = tuple[str, str, dict[str, Any], list[str], dict[str, str]]


def cases(models: list[str]) -> list[Case]:
    """What all layers of the models run under autocast."""
    found: list[tuple] = []
    for side, channels in {(8 >> i, c) for model in models for i, c in enumerate(SIZES[model][1])}:
        narrow, hidden = {"C": channels, "S": side}, {"H": 4 * channels}
        wide = narrow | {"BLOCK_C": triton.next_power_of_2(channels)}
        found += [
            *(("block_dwconv", "block_dwconv_kernel", wide | dict.fromkeys(none), half) for none, half in CONVOLUTIONS),
            ("block_dwconv", "block_dwconv_weight_kernel", narrow, []),
            ("layer_norm", "layer_norm_kernel", wide | {"TILE": min(2, side)}, ["out"]),
            ("layer_norm", "layer_norm_backward_kernel", wide | {"TILE": min(2, side)}, ["grad"]),
            *(("gelu_grn", f"{name}_kernel", hidden, []) for name in ("response", "coupling")),
        ]
        for name in ("squares", "scale", "products", "unscale"):
            # on its own, gelu_grn has no bias before it and leaves beta to what follows
            for none in ((), ("bias", "beta")):
                constants = hidden | dict.fromkeys(none)
                found.append(("gelu_grn", f"{name}_kernel", constants, ["x", "grad", "grad_x", "out"]))
    return [(*case, TYPES) for case in found] + cases_of_pixels()


def cases_of_pixels() -> list[Case]:
    """What reads images of 224x224, of three channels and more."""
    found = []
    for (dtype, (can_miss, wide)), channels in product(STORED.items(), (3, 13)):
        sizes = {"C": channels, "SIDE": 32, "COLS": 7, "PATCHES": 49}
        sizes |= {"NORMALISES": True, "CAN_MISS": can_miss, "WIDE": wide}
        types = OF_PIXELS | {"pixels": f"*{dtype}"}
        found.append(("patch_embed", "patch_windows_kernel", sizes | {"K": 4, "BLOCK": 1024}, ["out"], types))
        for backward in (False, True):
            errors = sizes | {"NORMALISED": True, "BACKWARD": backward, "BLOCK": BLOCK, "num_warps": WARPS}
            half = ["prediction", *["result"] * backward]
            found.append(("patch_errors", "patch_errors_kernel", errors, half, types))
    return found


def usage(capability: int, case: Case) -> list[dict[str, Any]]:
    """Registers, spilled bytes and shared memory of a kernel, for each of its tiles."""
    module, name, constants, halves, known = case
    kernel, rows = getattr(import_module(f"sparse_fcmae.kernels.triton.{module}"), name), []
    function, tiles = getattr(kernel, "fn", kernel), getattr(kernel, "configs", [triton.Config({})])
    if getattr(kernel, "early_config_prune", None):
        tiles = kernel.early_config_prune(tiles, {}, **constants)
    if not isinstance(kernel, triton.runtime.Autotuner):
        function, tiles = kernel, [triton.Config({})]
    for tile in tiles:
        fixed = {k: v for k, v in (constants | tile.kwargs).items() if k in function.arg_names}
        types = {p.name: known.get(p.name, "*bf16" if p.name in halves else "*fp32") for p in function.params}
        types |= dict.fromkeys(fixed, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
        source = ASTSource(function, types, constexprs=fixed, attrs=aligned)
        target = GPUTarget("cuda", capability, 32)
        warps = constants.get("num_warps", tile.num_warps)
        binary = triton.compile(source, target=target, options={"num_warps": warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(binary.asm["cubin"])
            command = [CUOBJDUMP, "-res-usage", file.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
        registers, stack, shared, local = map(int, found.groups())
        taken = {"warps": warps, "registers": registers, "spilled": stack + local, "shared": shared}
        rows.append({"kernel": name} | taken | {k: v for k, v in fixed.items() if v is not None})
    return rows


if __name__ == "__main__":
    every = cases(sys.argv[2:])
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(usage, [int(sys.argv[1])] * len(every), every))
    print(json.dumps([row for rows in results for row in rows]))
