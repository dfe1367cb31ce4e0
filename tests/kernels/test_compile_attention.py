"""The attention kernels compile for sm_90 on a machine without a GPU, as they are launched, and fit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels.attention.decode_shapes import CUTS, FLOAT32, DecodeShape
from penstock.kernels.dispatch import INTERPRETED

if INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

from penstock.kernels.attention import decode_kernel, prefill_kernel, tails_kernel
from penstock.kernels.compile import REGISTERS, SHARED_MEMORY_BYTES, Compiled, compile_for_sm90

BF16, F32 = torch.bfloat16, torch.float32
KV_HEADS, GROUP = 8, 4
ALL_CUTS = list(dict.fromkeys(shape for cuts in CUTS.values() for _, shape in cuts))
SPILLED_BYTES = 256
"""What a thread of the least fitting shape may spill. Where the head has 128 dimensions, none does."""


class Launches:
    """Stands where a kernel does, and compiles what it is launched with."""

    def __init__(self, kernel: Any, made: list[Compiled]) -> None:
        self._kernel, self._made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, num_warps: int) -> None:
            self._made.append(compile_for_sm90(self._kernel, arguments, warps=num_warps))

        return launch


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """The kernels that were launched, compiled."""
    made: list[Compiled] = []
    for module, name in (
        (decode_kernel, "decode_kernel"),
        (decode_kernel, "merge_kernel"),
        (prefill_kernel, "prefill_kernel"),
        (tails_kernel, "clear_tails_kernel"),
    ):
        monkeypatch.setattr(module, name, Launches(getattr(module, name), made))
    return made


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def pages(head_dim: int, block_tokens: int, dtype: torch.dtype) -> Tensor:
    return meta(9, block_tokens, KV_HEADS, head_dim, dtype=dtype)


def decode(shape: DecodeShape, head_dim: int, block_tokens: int, dtype: torch.dtype) -> None:
    cache = pages(head_dim, block_tokens, dtype)
    query = meta(3, KV_HEADS * GROUP, head_dim, dtype=dtype)
    decode_kernel.paged_decode_attention_triton(query, cache, cache, meta(5, 64), meta(3), meta(3), 0.1, shape=shape)


def prefill(rows: int, head_dim: int, block_tokens: int, dtype: torch.dtype) -> None:
    cache = pages(head_dim, block_tokens, dtype)
    query = meta(rows, KV_HEADS * GROUP, head_dim, dtype=dtype)
    prefill_kernel.paged_prefill_attention_triton(
        query, cache, cache, meta(5, 64), meta(1), meta(2), meta(1), rows, 0.1
    )


def assert_fits(kernel: Compiled, spilled_bytes: int) -> None:
    assert kernel.shared_bytes <= SHARED_MEMORY_BYTES
    assert kernel.registers * kernel.threads <= REGISTERS
    assert kernel.spilled_bytes <= spilled_bytes


@pytest.mark.parametrize("shape", ALL_CUTS, ids=str)
def test_every_cut_of_decode(shape: DecodeShape, made: list[Compiled]) -> None:
    decode(shape, 128, 64, BF16)
    assert len(made) == (2 if shape.splits > decode_kernel.MOST_MERGED else 1)
    for kernel in made:
        assert_fits(kernel, 0)
    attend = made[0]
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16" in attend.ptx, "tensor cores multiply"
    assert "cp.async.cg.shared.global" in attend.ptx, "pages are fetched ahead, 16 bytes at a time"


@pytest.mark.parametrize("block_tokens", [pytest.param(16, marks=pytest.mark.long), 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_decode_of_other_shapes(head_dim: int, block_tokens: int, made: list[Compiled]) -> None:
    decode(ALL_CUTS[0], head_dim, block_tokens, BF16)
    for kernel in made:
        assert_fits(kernel, SPILLED_BYTES)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_in_float32(head_dim: int, made: list[Compiled]) -> None:
    decode(FLOAT32, head_dim, 64, F32)
    for kernel in made:
        assert_fits(kernel, SPILLED_BYTES)
        assert "tf32" not in kernel.ptx, "float32 is not rounded"


@pytest.mark.parametrize("rows", [16, 64, 1024])
@pytest.mark.parametrize(("head_dim", "block_tokens"), [(64, 64), (80, 64), (128, 64), (128, 16), (256, 64)])
def test_prefill(rows: int, head_dim: int, block_tokens: int, made: list[Compiled]) -> None:
    prefill(rows, head_dim, block_tokens, BF16)
    (kernel,) = made
    assert_fits(kernel, SPILLED_BYTES if head_dim not in (64, 128) else 0)
    if rows >= 64:
        assert "wgmma.mma_async" in kernel.ptx, "four warps multiply together"
    assert "cp.async.cg.shared.global" in kernel.ptx, "pages are fetched ahead, 16 bytes at a time"


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_prefill_in_float32(head_dim: int, made: list[Compiled]) -> None:
    prefill(1024, head_dim, 64, F32)
    (kernel,) = made
    assert_fits(kernel, SPILLED_BYTES)
    assert "tf32" not in kernel.ptx, "float32 is not rounded"


def test_an_argument_of_another_kind() -> None:
    kernel = decode_kernel.merge_kernel
    with pytest.raises(ValueError, match="argument 'partial' is neither a number nor a tensor"):
        compile_for_sm90(kernel, [meta(1, dtype=torch.int8)] * len(kernel.params), warps=1)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_clearing_of_tails(head_dim: int, made: list[Compiled]) -> None:
    tails_kernel.clear_tails_triton(pages(head_dim, 128, BF16), meta(3, 64), meta(3))
    (kernel,) = made
    assert_fits(kernel, 0)
