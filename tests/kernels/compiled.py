"""Compile a Triton kernel for a GPU that is not there; all use of Triton's private parts is here.

Works without a driver, since the wheel brings its own assembler; not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory that a block may have, by compute capability: those that are checked.
SHARED_MEMORY = {
    capability: kib * 1024
    for capability, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
}


@dataclass(frozen=True)
class Compiled:
    registers: int  # per thread
    spills: int  # bytes of stack per thread: registers that did not fit
    shared: int  # bytes per block
    ptx: str


def compile(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
    divisible: Collection[str] = (),
    max_registers: int | None = None,
) -> Compiled:
    """kernel: a `triton.jit` function; signature: {"x_ptr": "*fp32", "n": "i32", ...} without the
    constexprs; capability: a key of SHARED_MEMORY.

    Pointers are taken to be 16-byte aligned, as torch's are, and the integers named in `divisible`
    to be multiples of 16; max_registers: `maxnreg` of the launch. Raises what the compiler raises.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or name in divisible
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": max_registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], text=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(int(registers), int(stack), compiled.metadata.shared, compiled.asm["ptx"])
