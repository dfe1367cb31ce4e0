"""Attention of few rows against torch: every length around a tile and a page, both ways to merge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.gemv.attention import (
    FewRows,
    HeadNorms,
    SplitRoom,
    few_rows_attention,
    few_rows_attention_reference,
)
from penstock.kernels.gemv.product import Splits
from penstock.kernels.gemv.shapes import SplitShape
from support.devices import on_every_kernel

LENGTHS = (0, 1, 15, 16, 17, 31, 32, 63, 64, 65, 100, 127, 130, 190)
BLOCKS, SLOTS, WIDTH = 16, 4, 12
SHAPES = [
    SplitShape(1, 16, 1, 4, True),
    SplitShape(4, 16, 2, 4, False),
    SplitShape(8, 32, 2, 2, True),
    SplitShape(2, 64, 1, 4, True),
]


class Case:
    """Four rows of different lengths over shuffled pages, in memory that is NaN wherever nobody wrote."""

    def __init__(self, lengths: tuple[int, ...], block: int, group: int, dim: int, norm: bool, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.kv_heads, self.heads, self.dim = 2, 2 * group, dim
        rows = len(lengths)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        blocks = max(BLOCKS, sum(-(-(length + 1) // block) for length in lengths)) + 1
        self.keys = torch.full((blocks, block, self.kv_heads, dim), float("nan"), dtype=dtype, device=device)
        self.values = self.keys.clone()
        self.block_tables = torch.full((SLOTS + 1, 200 // block + 1), blocks - 1, dtype=torch.int32, device=device)
        free = iter(torch.randperm(blocks - 1).tolist())
        for row, length in enumerate(lengths):
            for page in range(-(-(length + 1) // block)):
                number = next(free)
                self.block_tables[row, page] = number
                held = min(block, length - page * block)
                if held > 0:
                    self.keys[number, :held] = drawn(held, self.kv_heads, dim)
                    self.values[number, :held] = drawn(held, self.kv_heads, dim)
        self.qkv = drawn(rows, (self.heads + 2 * self.kv_heads) * dim)
        angles = torch.randn(256, dim // 2, device=device)
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        self.norms = HeadNorms(drawn(dim), drawn(dim), 1e-6) if norm else None
        self.rows = FewRows(
            torch.tensor(lengths, dtype=torch.int32, device=device),
            torch.arange(rows, dtype=torch.int32, device=device),
            drawn(rows, 8),
        )

    def run(self, shape: SplitShape) -> Tensor:
        room = SplitRoom.allocate(
            len(self.qkv), self.heads, self.kv_heads, self.dim, shape.splits, self.qkv.dtype, self.qkv.device
        )
        for left in (room.splits.partial, room.splits.lse, room.merged):
            left.fill_(float("nan"))
        made = few_rows_attention(*self.arguments(), shape, room)
        assert not room.arrivals.any()
        return made.merged() if isinstance(made, Splits) else made

    def arguments(self) -> tuple[Tensor, FewRows, Tensor, HeadNorms | None, Tensor, Tensor, Tensor, float]:
        return (
            self.qkv, self.rows, self.cos_sin, self.norms, self.keys, self.values, self.block_tables, self.dim**-0.5
        )  # fmt: skip


@on_every_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("block", "group", "dim", "norm"),
    [
        (16, 2, 32, True),
        pytest.param(64, 4, 64, False, marks=pytest.mark.long),
        (64, 1, 32, True),
        (32, 16, 16, False),
    ],
)
def test_equals_torch(device: str, shape: SplitShape, block: int, group: int, dim: int, norm: bool) -> None:
    torch.manual_seed(block + group)
    for first in (0, 4, 8, 10):
        lengths = LENGTHS[first : first + 4]
        case = Case(lengths, block, group, dim, norm, device)
        keys, values = case.keys.clone(), case.values.clone()
        got = case.run(shape)
        written, case.keys, case.values = (case.keys, case.values), keys, values
        want = few_rows_attention_reference(*case.arguments())
        tolerance = 2e-2 if device == "cuda" else 1e-5
        assert float((got - want).double().norm() / want.double().norm()) < tolerance
        for mine, theirs in zip(written, (case.keys, case.values), strict=True):
            assert torch.allclose(mine.float(), theirs.float(), tolerance, tolerance, equal_nan=True), "the pages"


@on_every_kernel
def test_rows_that_do_not_count_go_to_the_scratch_block(device: str) -> None:
    case = Case((40, 5), 16, 2, 32, False, device)
    case.rows.tables[1], case.rows.positions[1] = SLOTS, 0
    before = case.keys.clone()
    got = case.run(SHAPES[1])
    changed = (case.keys != before) & ~(case.keys.isnan() & before.isnan())
    blocks = changed.flatten(1).any(1).nonzero().flatten().tolist()
    assert sorted(blocks) == sorted({int(case.block_tables[0, 40 // 16]), len(case.keys) - 1})
    assert got.isfinite().all()
