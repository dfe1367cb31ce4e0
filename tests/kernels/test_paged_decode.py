"""Decode attention against the definition, written out in float64, over pages that are NaN wherever nobody wrote.

``TRITON_INTERPRET=1`` runs the kernels without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from penstock.kernels.attention.decode import paged_decode_attention
from penstock.kernels.attention.decode_shapes import CUTS, FLOAT32, DecodeShape, Spread, decode_shape
from penstock.kernels.dispatch import INTERPRETED
from support.devices import on_every_device, on_every_kernel

NAN = float("nan")
NARROW = torch.float16 if INTERPRETED else torch.bfloat16
"""The interpreter multiplies the bit patterns of bfloat16 (Triton 3.6); to the kernels, float16 is the same."""
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the error of a row, relative to its length."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, NARROW], ids=str)
ALL_CUTS = list(dict.fromkeys([shape for cuts in CUTS.values() for _, shape in cuts] + [FLOAT32]))


class Case:
    """Rows of different contexts, their pages shuffled; what belongs to nobody is NaN."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        device: str,
        dtype: torch.dtype,
        kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 64,
        block_tokens: int = 64,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + head_dim)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        pages = [-(-length // block_tokens) for length in lengths]
        blocks = torch.randperm(sum(pages) + 2, generator=generator).int()
        tables = torch.full((len(lengths) + 1, max(pages, default=0) + 2), -1, dtype=torch.int32)
        row_slots = torch.randperm(len(lengths), generator=generator).int()
        caches = [torch.full((len(blocks), block_tokens, kv_heads, head_dim), NAN, dtype=dtype) for _ in range(2)]
        self.query = random(len(lengths), kv_heads * group, head_dim) * 3
        self.scale = 1 / math.sqrt(head_dim)
        self.expected = torch.zeros(self.query.shape, dtype=torch.float64)
        for row, (slot, length) in enumerate(zip(row_slots.tolist(), lengths, strict=True)):
            own, blocks = blocks[: pages[row]], blocks[pages[row] :]
            tables[slot, : pages[row]] = own
            past = random(2, length, kv_heads, head_dim)
            for cache, written in zip(caches, past, strict=True):
                place = torch.arange(length)
                cache[own.long()[place // block_tokens], place % block_tokens] = written
            if length:
                key, value = past.double().repeat_interleave(group, dim=2)
                weights = torch.einsum("hd,thd->ht", self.query[row].double(), key).mul(self.scale).softmax(-1)
                self.expected[row] = torch.einsum("ht,thd->hd", weights, value)
            else:
                self.query[row] = NAN
        self.query, self.keys, self.values = (tensor.to(device) for tensor in (self.query, *caches))
        self.tables, self.row_slots = tables.to(device), row_slots.to(device)
        self.contexts = torch.tensor(lengths, dtype=torch.int32, device=device)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
        return self.query, self.keys, self.values, self.tables, self.row_slots, self.contexts, self.scale

    def poisoned(self) -> Tensor:
        return torch.full_like(self.query, NAN)

    def attend(self, shape: DecodeShape) -> Tensor:
        """By the kernel, cut like that."""
        from penstock.kernels.attention.decode_kernel import paged_decode_attention_triton

        return paged_decode_attention_triton(*self.arguments, out=self.poisoned(), shape=shape)

    def assert_right(self, out: Tensor) -> None:
        """Every row within its bound; rows that do not count are zero."""
        difference = out.double().cpu() - self.expected
        error = difference.flatten(1).norm(dim=1)
        assert (error <= BOUND[self.query.dtype] * self.expected.flatten(1).norm(dim=1)).all(), error


@on_every_device
@DTYPES
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_tokens"),
    [
        (2, 2, 128, 64),
        (1, 4, 128, 16),
        (3, 1, 64, 32),
        (1, 8, 64, 64),
        (2, 3, 80, 64),
        pytest.param(1, 5, 96, 16, marks=pytest.mark.long),
        (2, 7, 256, 64),
        (1, 17, 64, 64),
    ],
)
def test_equals_the_definition(
    device: str, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, block_tokens: int
) -> None:
    case = Case(
        [197, 129, 128, 64, 63, 17, 1, 0],
        device=device,
        dtype=dtype,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        block_tokens=block_tokens,
    )
    out = case.poisoned()
    assert paged_decode_attention(*case.arguments, out=out) is out
    case.assert_right(out)


@on_every_device
def test_allocates_its_output(device: str) -> None:
    case = Case([33, 0, 5], device=device, dtype=torch.float32)
    case.assert_right(paged_decode_attention(*case.arguments))


@on_every_kernel
@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("shape", ALL_CUTS, ids=str)
def test_every_cut(device: str, shape: DecodeShape, block_tokens: int) -> None:
    """A tuner takes the fastest cut, the wrong one, too."""
    # Contexts that end at, just before and just behind the ends of tiles and chunks, for one and for all splits.
    chunk = shape.min_chunk
    lengths = [3 * chunk + 1, 3 * chunk, 2 * chunk - 1, chunk + shape.tile, chunk, shape.tile + 1, 1, 0]
    case = Case(lengths, device=device, dtype=NARROW, kv_heads=1, group=4, head_dim=128, block_tokens=block_tokens)
    case.assert_right(case.attend(shape))


@on_every_kernel
@DTYPES
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([150, 97, 96, 33, 32, 1, 0], id="longest first"),
        pytest.param([20, 150, 0, 97, 33], id="the longest is not first"),
        pytest.param([0, 150, 7], id="the first does not count"),
        pytest.param([0, 0], id="none counts"),
    ],
)
def test_splits(device: str, dtype: torch.dtype, splits: int, lengths: list[int]) -> None:
    case = Case(lengths, device=device, dtype=dtype, group=3)
    case.assert_right(case.attend(DecodeShape(tile=16, stages=2, warps=2, splits=splits, min_chunk=32)))


@on_every_device
def test_no_rows(device: str) -> None:
    case = Case([], device=device, dtype=torch.float32)
    assert paged_decode_attention(*case.arguments).shape == (0, 4, 64)


@on_every_device
def test_writes_its_own_rows_only(device: str) -> None:
    case = Case([40, 3, 0], device=device, dtype=torch.float32)
    around = torch.full((7, *case.query.shape[1:]), NAN, device=device)
    paged_decode_attention(*case.arguments, out=around[2:5])
    case.assert_right(around[2:5])
    assert around[:2].isnan().all()
    assert around[5:].isnan().all()


@on_every_device
@pytest.mark.parametrize("spread", list(Spread))
def test_the_hint_does_not_change_the_result(device: str, spread: Spread) -> None:
    rows = 30 if device == "cuda" else 3
    case = Case([70, 9, *[5] * (rows - 2)], device=device, dtype=NARROW, kv_heads=1)
    case.assert_right(paged_decode_attention(*case.arguments, spread=spread))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize(("kv_heads", "group"), [(8, 2), (8, 4)], ids=["Qwen3-0.6B", "Llama-3.1-8B"])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([8192], id="1 of 8192"),
        pytest.param([3000, *[700] * 6, 1, 0], id="9 rows, one long"),
        pytest.param([4001, *[50] * 39], id="40 rows, one long"),
        pytest.param(sorted((200 + 37 * row % 1300 for row in range(100)), reverse=True), id="100 mixed"),
        pytest.param([850] * 160, id="160 of 850"),
        pytest.param([600] * 256, id="256 of 600"),
    ],
)
@pytest.mark.parametrize("spread", list(Spread))
def test_real_shapes(dtype: torch.dtype, kv_heads: int, group: int, lengths: list[int], spread: Spread) -> None:
    case = Case(lengths, device="cuda", dtype=dtype, kv_heads=kv_heads, group=group, head_dim=128)
    case.assert_right(paged_decode_attention(*case.arguments, out=case.poisoned(), spread=spread))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 40])
def test_a_graph_reads_the_lengths_when_it_is_replayed(rows: int) -> None:
    case = Case([300] * rows, device="cuda", dtype=torch.bfloat16)
    out = case.poisoned()
    paged_decode_attention(*case.arguments, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_decode_attention(*case.arguments, out=out)
    other = Case([290 - 7 * row for row in range(rows)], device="cuda", dtype=torch.bfloat16)
    for mine, its in zip(case.arguments[:-1], other.arguments[:-1], strict=True):
        mine[tuple(slice(0, size) for size in its.shape)].copy_(its)
    out.fill_(NAN)
    graph.replay()
    other.assert_right(out)


@pytest.mark.gpu
def test_blocks_far_into_a_large_cache() -> None:
    """Offsets beyond 2³¹ elements."""
    case = Case([200, 90, 1], device="cuda", dtype=torch.bfloat16, kv_heads=8, head_dim=128)
    far = 2**31 // case.keys[0].numel() + 5
    for name in ("keys", "values"):
        near = getattr(case, name)
        large = torch.empty(far + near.shape[0], *near.shape[1:], dtype=near.dtype, device="cuda")
        large[far:] = near
        setattr(case, name, large)
    case.tables += far
    case.assert_right(paged_decode_attention(*case.arguments, out=case.poisoned()))


@pytest.mark.parametrize("spread", list(Spread))
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 32])
def test_there_is_a_cut_for_every_batch(spread: Spread, kv_heads: int) -> None:
    for rows in range(1, 1025):
        shape = decode_shape(rows, kv_heads, torch.bfloat16, spread)
        assert shape.min_chunk % shape.tile == 0
        assert shape.splits > 1 or rows * kv_heads > 132, "fewer programs than an H200 has multiprocessors"
        assert decode_shape(rows, kv_heads, torch.float32, spread) == FLOAT32


def test_how_lengths_spread() -> None:
    assert Spread.of(850, 850 * 100, 100) is Spread.EVEN
    assert Spread.of(1200, 864 * 100, 100) is Spread.UNEVEN
    assert Spread.of(1500, 864 * 100, 100) is Spread.MIXED
    assert Spread.of(20_000, 20_000 + 500 * 99, 100) is Spread.LONE
    assert Spread.of(20_000, 20_000 + 500 * 3, 4) is Spread.MIXED
