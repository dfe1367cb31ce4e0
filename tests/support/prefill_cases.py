"""Sequences in shuffled pages whose attention is known: written out in float64 by its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.attention.chunks import Chunks
from penstock.kernels.attention.prefill import paged_prefill_attention
from penstock.kernels.dispatch import INTERPRETED

NAN = float("nan")
NARROW = torch.float16 if INTERPRETED else torch.bfloat16
"""The interpreter multiplies the bit patterns of bfloat16 (Triton 3.6); to the kernel, float16 is the same."""
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the error of a row, relative to its length."""

Lengths = Sequence[tuple[int, int]]
"""(cached tokens, rows of this step) of each sequence."""


def attended(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """By definition: ``query`` [rows, heads, head_dim] at the end of [context, heads, head_dim]; float64."""
    rows, context = query.shape[0], key.shape[0]
    scores = torch.einsum("qhd,thd->hqt", query, key) * scale
    hidden = torch.ones(rows, context, dtype=torch.bool, device=query.device).triu(context - rows + 1)
    return torch.einsum("hqt,thd->qhd", scores.masked_fill_(hidden, -math.inf).softmax(-1), value)


class Case:
    """Sequences in shuffled pages, each with a random past; what belongs to nobody is NaN."""

    def __init__(
        self,
        lengths: Lengths,
        *,
        device: str,
        dtype: torch.dtype,
        kv_heads: int = 1,
        group: int = 2,
        head_dim: int = 64,
        block_tokens: int = 64,
        pool: int = 0,
        width: int = 0,
    ) -> None:
        """``pool``, ``width``: blocks of the pool and of each table, at least."""
        generator = torch.Generator(device).manual_seed(len(lengths) + head_dim)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        counts = [rows for _, rows in lengths]
        contexts = [cached + rows for cached, rows in lengths]
        pages = [-(-context // block_tokens) for context in contexts]
        free = torch.randperm(max(sum(pages) + 2, pool), generator=generator, device=device)
        self.tables = torch.full((len(lengths) + 1, max(max(pages) + 2, width)), -1, dtype=torch.int32, device=device)
        self.slots = torch.randperm(len(lengths), generator=generator, device=device).int()
        shape = (len(free), block_tokens, kv_heads, head_dim)
        self.keys, self.values = (torch.full(shape, NAN, dtype=dtype, device=device) for _ in range(2))
        self.query = random(sum(counts), kv_heads * group, head_dim) * 3
        self.expected = torch.empty(self.query.shape, dtype=torch.float64, device=device)
        self.starts = torch.tensor([0, *counts], device=device).cumsum(0).int()
        self.contexts = torch.tensor(contexts, dtype=torch.int32, device=device)
        self.longest = max(counts)
        self.cached = sum(cached for cached, _ in lengths)
        self.scale = 1 / math.sqrt(head_dim)
        for sequence, context in enumerate(contexts):
            blocks, free = free[: pages[sequence]], free[pages[sequence] :]
            self.tables[self.slots[sequence], : len(blocks)] = blocks.int()
            place = torch.arange(context, device=device)
            past = random(2, context, kv_heads, head_dim)
            for cache, written in zip((self.keys, self.values), past, strict=True):
                cache[blocks[place // block_tokens], place % block_tokens] = written
            rows = slice(int(self.starts[sequence]), int(self.starts[sequence + 1]))
            for head in range(kv_heads):
                heads = slice(head * group, (head + 1) * group)
                key, value = past[:, :, head : head + 1].double().expand(-1, -1, group, -1)
                self.expected[rows, heads] = attended(self.query[rows, heads].double(), key, value, self.scale)

    def attend(self, out: Tensor | None = None) -> Tensor:
        tables = (self.tables, self.slots, self.starts, self.contexts, self.longest)
        out = torch.full_like(self.query, NAN) if out is None else out
        assert paged_prefill_attention(self.query, self.keys, self.values, *tables, self.scale, out=out) is out
        return out

    def chunks(self, *, cached: int | None = None) -> Chunks:
        """As a backend is bound to them."""
        places = []
        for sequence, (begin, context) in enumerate(zip(self.starts.tolist(), self.contexts.tolist(), strict=False)):
            count = int(self.starts[sequence + 1]) - begin
            position = torch.arange(context - count, context, device=self.query.device)
            page = self.tables[self.slots[sequence], position // self.keys.shape[1]].long()
            places.append(page * self.keys.shape[1] + position % self.keys.shape[1])
        return Chunks(
            self.tables, self.slots, self.starts, self.contexts, self.longest, torch.cat(places), cached=cached
        )

    def chunks_on_device(self) -> Chunks:
        """The same where the host knows lengths by bounds only, as under capture."""
        nowhere = self.slots.new_empty(0, dtype=torch.int64)
        return Chunks(self.tables, self.slots, self.starts, self.contexts, self.longest, nowhere)

    def error(self, out: Tensor) -> float:
        """The largest of a row, relative to its length; infinite where something is not a number."""
        error = (out.double() - self.expected).flatten(1).norm(dim=1) / self.expected.flatten(1).norm(dim=1)
        return float(error.nan_to_num(math.inf).max())

    def assert_right(self, out: Tensor) -> None:
        """Every row within its bound."""
        assert self.error(out) <= BOUND[self.query.dtype]
