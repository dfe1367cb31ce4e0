"""Compile a kernel for an H200 (sm_90) where there is no GPU, and say what it takes of a multiprocessor.

A tool for tests and for whoever writes kernels; nothing that serves imports it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY_BYTES = 227 * 1024
"""What a program may have of an sm_90 multiprocessor's shared memory."""
REGISTERS = 65_536
"""32-bit registers of an sm_90 multiprocessor."""

_TARGET = GPUTarget("cuda", 90, 32)
_ALIGNED_BYTES = 16
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_TOOL_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel for sm_90."""

    ptx: str
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Stack and local memory of a thread: what did not fit its registers."""
    shared_bytes: int
    """Shared memory of a program."""
    threads: int
    """Of a program."""


def compile_for_sm90(kernel: Any, arguments: Sequence[object], *, warps: int, stages: int = 3) -> Compiled:
    """Compile a ``triton.jit`` function as a launch with these positional arguments would.

    Tensors may be on any device, ``meta`` included: their dtypes count, and their memory is taken to be aligned to 16
    bytes, as torch's allocations are. Raises ValueError for an argument that no kernel of ours takes, and whatever
    Triton raises for a kernel that cannot be compiled.
    """
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(parameter.name, value)
        aligned = isinstance(value, Tensor) or (isinstance(value, int) and value % _ALIGNED_BYTES == 0)
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(index,)] = [["tt.divisibility", _ALIGNED_BYTES]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=_TARGET, options={"num_warps": warps, "num_stages": stages})
    used = _resources(made.asm["cubin"])
    return Compiled(made.asm["ptx"], used["REG"], used["STACK"] + used["LOCAL"], made.metadata.shared, 32 * warps)


def _type_of(name: str, value: object) -> str:
    if isinstance(value, Tensor) and value.dtype in _POINTERS:
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise ValueError(f"argument {name!r} is neither a number nor a tensor of a dtype that kernels take: {value!r}")


def _resources(cubin: bytes) -> dict[str, int]:
    """What the assembler reports of the only kernel in ``cubin``."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tool, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TOOL_SECONDS).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
