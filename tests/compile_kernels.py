"""Compiles every kernel for the compute capability in argv, without a GPU: the interpreter takes what the compiler
refuses. Prints each kernel's name and the bytes that one of its threads spills.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tenuto_models.fused import dnc, draw, linear, rows

DNC = {"HIDDEN": 256, "CELLS": 16, "WIDTH": 16, "HEADS": 4}
ODD = {"HIDDEN": 24, "CELLS": 5, "WIDTH": 7, "HEADS": 3}
LARGE = {"HIDDEN": 256, "CELLS": 64, "WIDTH": 32, "HEADS": 4}
LINEAR = {"STRIDE": 576, "INPUTS": 576, "OUTPUTS": 1024, "BLOCK_B": 32, "BLOCK_D": 32, "BLOCK_K": 32}
CASES: list[tuple[Any, dict[str, Any], int]] = [
    (dnc._collect, DNC | {"INPUTS": 256, "BLOCK": 1024}, 4),
    (dnc._lstm, DNC | {"BLOCK": 256}, 4),
    (dnc._access, DNC | {"N": 16, "W": 16}, 1),
    (dnc._access, ODD | {"N": 8, "W": 8}, 1),
    (dnc._access, LARGE | {"N": 64, "W": 32}, 4),
    (rows._append, {"KEPT": 768, "FEATURES": 256, "BLOCK": 1024}, 4),
    (draw._draw, {"LOGITS": 9, "PARTS": 3, "BLOCK": 16}, 1),
    (draw._draw, {"LOGITS": 8192, "PARTS": 1, "BLOCK": 8192}, 8),
    (rows._store, {"WIDTH": 1200, "STRIDE": 1200, "BLOCK": 1024}, 4),
    *((linear._linear, LINEAR | {"PRECISION": p}, 4) for p in ("ieee", "tf32x3", "tf32")),
]
TYPES = {
    "slots": "*i64", "t": "*i64", "counters": "*i64", "actions": "*i64", "starts": "*i64", "ends": "*i32",
    "episode_starts": "*i1", "keep": "*i1", "deterministic": "*i1", "finite": "*i1", "spare": "i32", "num_rows": "i32",
}  # fmt: skip


def spilled_bytes(ptx: str, capability: int) -> int:
    """What the assembler says."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        architecture = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
        command = [assembler, "-v", f"-arch={architecture}", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(said.stderr.split(" bytes spill stores")[0].rsplit(maxsplit=1)[-1])


capability = int(sys.argv[1])
for kernel, constants, num_warps in CASES:
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "*fp32") for n in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32), options={"num_warps": num_warps}
    )
    print(kernel.__name__, spilled_bytes(compiled.asm["ptx"], capability))
