"""Paged attention against the definition, written out per row in float64."""

import math

import pytest
import torch
from torch import Tensor

from penstock.kernels.attention.reference import (
    PagedLayout,
    Scratch,
    fresh_blocks,
    paged_attention,
    slot_mapping,
    write_kv,
)

NAN = float("nan")


class Case:
    """Sequences with a random past in shuffled pages of a cache that is NaN wherever nothing was written."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        """``lengths``: (cached tokens, rows of this step) of each sequence."""
        generator = torch.Generator().manual_seed(len(lengths) + head_dim)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.dtype, self.block_tokens, self.scale = dtype, block_tokens, 1 / math.sqrt(head_dim)
        self.lengths = lengths
        self.contexts = [cached + rows for cached, rows in lengths]
        self.keys = [random(context, kv_heads, head_dim) for context in self.contexts]
        self.values = [random(context, kv_heads, head_dim) for context in self.contexts]
        self.query = random(sum(rows for _, rows in lengths), heads, head_dim)
        pages = [-(-context // block_tokens) for context in self.contexts]
        shuffled = torch.randperm(sum(pages) + 3, generator=generator).int()
        self.tables = torch.full((len(lengths), max(pages) + 2), -1, dtype=torch.int32)
        for sequence, count in enumerate(pages):
            self.tables[sequence, :count] = shuffled[sum(pages[:sequence]) :][:count]
        shape = (sum(pages) + 3, block_tokens, kv_heads, head_dim)
        self.cache = torch.full(shape, NAN, dtype=dtype), torch.full(shape, NAN, dtype=dtype)

    def write(self, sequence: int, start: int, stop: int) -> None:
        positions = torch.arange(start, stop)
        slots = slot_mapping(positions, self.tables[sequence].expand(stop - start, -1), self.block_tokens)
        fresh = fresh_blocks(slots, self.block_tokens)
        write_kv(self.keys[sequence][start:stop], self.values[sequence][start:stop], *self.cache, slots, fresh)

    def attend(self) -> Tensor:
        for sequence, (cached, rows) in enumerate(self.lengths):
            if cached:
                self.write(sequence, 0, cached)
            self.write(sequence, cached, cached + rows)
        start = torch.tensor([0, *(rows for _, rows in self.lengths)]).cumsum(0).int()
        contexts = torch.tensor(self.contexts, dtype=torch.int32)
        layout = PagedLayout.build(start, contexts, self.tables, self.block_tokens, Scratch(self.dtype))
        return paged_attention(self.query, *self.cache, layout, self.scale)

    def expected(self) -> Tensor:
        out, row = [], 0
        for sequence, (cached, rows) in enumerate(self.lengths):
            group = self.query.shape[1] // self.keys[sequence].shape[1]
            keys = self.keys[sequence].double().repeat_interleave(group, dim=1)
            values = self.values[sequence].double().repeat_interleave(group, dim=1)
            for position in range(cached, cached + rows):
                scores = torch.einsum("hd,thd->ht", self.query[row].double(), keys[: position + 1]) * self.scale
                out.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values[: position + 1]))
                row += 1
        return torch.stack(out)


MIXES: dict[str, list[tuple[int, int]]] = {
    "prompts": [(0, 5), (0, 17), (0, 2)],
    "chunks behind a prefix": [(7, 9), (16, 16), (33, 2)],
    "decodes": [(40, 1), (1, 1), (0, 1), (15, 1), (16, 1)],
    "decodes of very different contexts": [(700, 1), (3, 1), (300, 1), (299, 1), (127, 1)],
    "all at once": [(20, 1), (0, 6), (63, 1), (13, 11), (500, 1)],
    "one decode": [(12, 1)],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 12), (7, 1, 64)])
@pytest.mark.parametrize("block_tokens", [16, 3])
def test_float32(mix: str, heads: int, kv_heads: int, head_dim: int, block_tokens: int) -> None:
    case = Case(
        MIXES[mix],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=torch.float32,
    )
    torch.testing.assert_close(case.attend().double(), case.expected(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_bfloat16_is_the_rounded_exact_answer(mix: str) -> None:
    """Two units in the last place of bfloat16 around 1: the softmax was not taken in 16 bits."""
    case = Case(MIXES[mix], heads=8, kv_heads=2, head_dim=32, block_tokens=16, dtype=torch.bfloat16)
    torch.testing.assert_close(case.attend().double(), case.expected(), atol=1.6e-2, rtol=1.6e-2)


def test_a_poisoned_sequence_poisons_nobody() -> None:
    """One decode's own keys are NaN: it alone is NaN, also where pages are padded."""
    case = Case([(40, 1), (3, 1), (20, 1)], heads=4, kv_heads=2, head_dim=16, block_tokens=16, dtype=torch.float32)
    expected = case.expected()
    case.keys[0][3] = NAN
    case.values[0][3] = NAN
    out = case.attend()
    assert bool(out[0].isnan().all())
    torch.testing.assert_close(out[1:].double(), expected[1:], atol=2e-6, rtol=1e-5)


def test_slots_and_fresh_blocks() -> None:
    tables = torch.tensor([[5, 2], [5, 2], [9, -1]], dtype=torch.int32)
    slots = slot_mapping(torch.tensor([3, 4, 0]), tables, block_tokens=4)
    assert slots.tolist() == [23, 8, 36]
    assert fresh_blocks(slots, 4).tolist() == [2, 9]
