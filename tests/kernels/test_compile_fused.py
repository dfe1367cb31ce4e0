"""The fused kernels compile for sm_90 without a GPU: wide loads, no spills, nothing specialised too far."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.kernels.dispatch import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
triton = pytest.importorskip("triton")

from penstock.kernels.activation_kernel import program_shape as silu_shape  # noqa: E402
from penstock.kernels.activation_kernel import silu_mul_kernel  # noqa: E402
from penstock.kernels.batch.gather_kernel import fill_rows_kernel, gather_rows_kernel  # noqa: E402
from penstock.kernels.batch.update_kernel import apply_words_kernel  # noqa: E402
from penstock.kernels.norm_kernel import add_rms_norm_kernel, warps  # noqa: E402
from penstock.kernels.rope_kernel import program_shape as rope_shape  # noqa: E402
from penstock.kernels.rope_kernel import rotate_and_store_kernel  # noqa: E402

KERNELS = (
    add_rms_norm_kernel,
    silu_mul_kernel,
    rotate_and_store_kernel,
    apply_words_kernel,
    gather_rows_kernel,
    fill_rows_kernel,
)
INTEGERS = {"rows", "first", "count"}
WORDS = {"positions", "row_slots", "live", "last_token", "computed", "block_tables", "ids", "contexts"} | {
    "from_ids", "from_positions", "slots", "arena", "words",
}  # fmt: skip
UNALIGNED = {"live", "last_token", "computed", "block_tables", "row_slots", "words"}
"""They stand anywhere in the arena, or are not asked."""
ROWS = (1, 16, 8192)


def compiled(kernel: Any, dtype: torch.dtype, num_warps: int, **constants: object) -> Any:
    """The kernel for sm_90, its matrices of ``dtype``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"OVERLAP": False, "SIZE": 0, "SIZE_TILE": 1, "BIAS": False} | constants
    if not constants["BIAS"]:
        constants["bias"] = None
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if (name in constants and name.isupper()) or constants.get(name, 0) is None:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name in ("eps", "stream_eps"):
            signature[name] = "fp32"
        elif name in WORDS:
            signature[name] = "*i32"
        elif name in ("cos_sin", "slot_mapping"):
            signature[name] = "*fp32" if name == "cos_sin" else "*i64"
        else:
            signature[name] = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        if signature[name].startswith("*") and name not in UNALIGNED:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def used_of(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory, as the assembler reports them."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True, timeout=60).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def assert_fits(kernel: Any, num_warps: int, folder: Path) -> None:
    """No spills, and half of a multiprocessor's threads have registers: memory is kept busy."""
    used = used_of(kernel, folder)
    assert used["LOCAL"] == 0
    assert used["STACK"] <= 8  # ptxas gives 512 threads a word or two unasked
    assert used["REG"] <= 64


def wide_loads(kernel: Any) -> int:
    """Loads of 16 bytes a thread."""
    return len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"]))


in_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@in_every_dtype
@pytest.mark.parametrize("size", [1024, 4096, 5120, 8192])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
def test_norm(size: int, add: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    tile = triton.next_power_of_2(size)
    kernel = compiled(
        add_rms_norm_kernel, dtype, warps(size), SIZE=size, TILE=tile, PARTS=1, ADD=add, STORE=add
    )  # fmt: skip
    assert_fits(kernel, warps(size), tmp_path)
    assert wide_loads(kernel) == (3 if add else 2) * tile * dtype.itemsize // (16 * 32 * warps(size))


@in_every_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inner", "late"), [(3072, 0), (14336, 0), (3072, 1024), (14336, 4096)])
def test_silu_mul(inner: int, late: int, rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tile, num_warps = silu_shape(rows)
    kernel = compiled(silu_mul_kernel, dtype, num_warps, INNER=inner, TILE=tile, SIZE=late, SIZE_TILE=max(1, late))
    if late:
        assert used_of(kernel, tmp_path)["LOCAL"] == 0
        return
    assert_fits(kernel, num_warps, tmp_path)
    assert wide_loads(kernel) == 2 * tile * dtype.itemsize // (16 * 32 * num_warps)


@in_every_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (32, 8, 128), (14, 2, 64), (24, 8, 80)])
def test_rotate_and_store(
    heads: int, kv_heads: int, head_dim: int, norm: bool, bias: bool, rows: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tile, num_warps = rope_shape(rows)
    half = head_dim // 2
    constants: dict[str, object] = {} if norm else {"q_weight": None, "k_weight": None}
    constants |= {"HEADS": heads, "KV_HEADS": kv_heads, "HALF": half, "TILE": triton.next_power_of_2(half)}
    kernel = compiled(rotate_and_store_kernel, dtype, num_warps, HEAD_TILE=tile, NORM=norm, BIAS=bias, **constants)
    assert_fits(kernel, num_warps, tmp_path)


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        pytest.param(apply_words_kernel, {"TILE": 256}, id="apply_words"),
        pytest.param(gather_rows_kernel, {"SLOTS": 256, "BLOCK": 64, "WIDTH": 513, "TILE": 128}, id="gather_rows"),
        pytest.param(fill_rows_kernel, {"BLOCK": 64, "WIDTH": 513, "TILE": 128}, id="fill_rows"),
    ],
)
def test_batch(kernel: Any, constants: dict[str, object], tmp_path: Path) -> None:
    assert_fits(compiled(kernel, torch.bfloat16, 4, **constants), 4, tmp_path)


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        pytest.param(
            add_rms_norm_kernel, {"SIZE": 1024, "TILE": 1024, "PARTS": 4, "ADD": True, "STORE": True}, id="norm"
        ),
        pytest.param(silu_mul_kernel, {"INNER": 3072, "TILE": 256}, id="silu_mul"),
        pytest.param(
            rotate_and_store_kernel,
            {"HEADS": 16, "KV_HEADS": 8, "HALF": 64, "TILE": 64, "HEAD_TILE": 8, "NORM": True},
            id="rotate_and_store",
        ),
        pytest.param(
            rotate_and_store_kernel,
            {"HEADS": 14, "KV_HEADS": 2, "HALF": 32, "TILE": 32, "HEAD_TILE": 8, "NORM": False, "BIAS": True},
            id="rotate_and_store, bias",
        ),
    ],
)
def test_nothing_is_written_before_the_kernel_in_front_is_done(kernel: Any, constants: dict[str, object]) -> None:
    overlapped = compiled(kernel, torch.bfloat16, 4, OVERLAP=True, **constants).asm["ptx"]
    before, waited, _ = overlapped.partition("griddepcontrol.wait")
    assert waited
    assert "st.global" not in before
    assert "griddepcontrol" not in compiled(kernel, torch.bfloat16, 4, **constants).asm["ptx"]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_what_varies_from_step_to_step_is_not_specialised(kernel: Any) -> None:
    """Else a step of 1 or of 16 rows would compile while it serves."""
    varying = [parameter for parameter in kernel.params if parameter.name in INTEGERS]
    assert all(parameter.do_not_specialize for parameter in varying)


@pytest.mark.gpu
def test_one_compilation_serves_steps_of_any_size() -> None:
    from penstock.kernels.batch.gather import StepRows, fill_rows, gather_rows
    from penstock.kernels.batch.state import ArenaLayout, BatchState
    from penstock.kernels.batch.update import apply_words
    from penstock.kernels.norm import add_rms_norm

    device = torch.device("cuda")
    state = BatchState.allocate(ArenaLayout(37, 11, 300), device, scratch_block=0)
    out = StepRows.allocate(600, device)
    weight = torch.ones(1024, device=device)

    def steps(counts: list[int]) -> list[int]:
        for count in counts:
            column = torch.zeros(count, dtype=torch.int32, device=device)
            apply_words(state.arena, torch.arange(2 * count, dtype=torch.int32, device=device).view(count, 2))
            gather_rows(state, count, 16, out)
            fill_rows(state, out, count, column, column, column, 16)
            add_rms_norm(torch.zeros(count, 1024, device=device), None, weight, 1e-6)
        torch.cuda.synchronize()
        kernels = (apply_words_kernel, gather_rows_kernel, fill_rows_kernel, add_rms_norm_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    assert steps([3]) == steps([1, 2, 16, 17, 128, 255, 256])
