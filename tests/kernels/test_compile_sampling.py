"""The kernels of the sampling tail compile for sm_90 on a machine without a GPU, and nothing spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels.batch.state import MAX_STOP_IDS
from penstock.kernels.dispatch import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

from penstock.kernels.sampling.filter_kernel import survey, threshold  # noqa: E402
from penstock.kernels.sampling.finish_kernel import finish  # noqa: E402
from penstock.kernels.sampling.launch import BLOCK, SURVEY_TILE  # noqa: E402
from penstock.kernels.sampling.reference import TILE  # noqa: E402
from penstock.kernels.sampling.tail import CANDIDATES, FAILED, INERT, MADE, PEAK  # noqa: E402
from penstock.kernels.sampling.weigh_kernel import weigh  # noqa: E402

FLOATS = {"temperature", "top_p", "min_p", "floors", "weights", "peaks"}
COUNTS = {"logits_stride", "weights_stride", "vocabulary", "tiles", "peak_stride", "candidates_stride"}
ALIGNED = {"logits_stride", "vocabulary", "candidates_stride"}
"""Multiples of 16, as they are for real vocabularies."""
FINISH = {
    "TILES": 512,
    "TILE": TILE,
    "STOP_IDS": MAX_STOP_IDS,
    "INERT": INERT,
    "MADE": MADE,
    "FAILED": FAILED,
}


def compiled(kernel: Any, dtype: torch.dtype, warps: int, **constants: object) -> Any:
    """The kernel for sm_90, ``logits`` and ``candidates`` of ``dtype``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"OVERLAP": False} | constants
    logits = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            signature[name] = logits if name in ("logits", "candidates") else "*fp32" if name in FLOATS else "*i32"
        if name in ALIGNED or (signature[name].startswith("*") and name != "slots"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory, as the assembler reports them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True, timeout=60).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "warps", "constants"),
    [
        pytest.param(weigh, 1, {"FILTERED": False, "STOP_IDS": MAX_STOP_IDS, "TILE": TILE}, id="weigh"),
        pytest.param(weigh, 1, {"FILTERED": True, "STOP_IDS": MAX_STOP_IDS, "TILE": TILE}, id="weigh, filtered"),
        pytest.param(survey, 8, {"STOP_IDS": MAX_STOP_IDS, "TILE": SURVEY_TILE, "PEAK": PEAK}, id="survey"),
        pytest.param(
            threshold,
            16,
            {"STOP_IDS": MAX_STOP_IDS, "CANDIDATES": CANDIDATES, "PEAKS": 512, "BLOCK": BLOCK, "SHIFT": None},
            id="threshold",
        ),
        pytest.param(finish, 4, FINISH | {"FILTERED": False}, id="finish"),
        pytest.param(finish, 4, FINISH | {"FILTERED": True}, id="finish, filtered"),
    ],
)
def test_kernels_fit_the_registers(
    kernel: Any, warps: int, constants: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    if "SHIFT" in constants:
        constants = constants | {"SHIFT": 16 if dtype == torch.bfloat16 else 0}
    made = compiled(kernel, dtype, warps, **constants)
    used = resources(made, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] * 32 * warps <= 65_536
    assert made.metadata.shared <= 48 * 1024


def test_weighing_a_tile_takes_wide_loads_and_one_exponential_an_entry() -> None:
    made = compiled(weigh, torch.bfloat16, 1, FILTERED=False, STOP_IDS=MAX_STOP_IDS, TILE=TILE)
    assert made.asm["ptx"].count("ex2.approx") == TILE // 32
    assert made.asm["ptx"].count("lg2.approx.ftz.f32") == 1
    assert "ld.global.v4" in made.asm["ptx"]
    assert "bar.sync" not in made.asm["ptx"], "one warp has nobody to wait for"
