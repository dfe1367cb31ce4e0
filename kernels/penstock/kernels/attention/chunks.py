"""Attention of a step's chunks behind one protocol: bound to the step once, then called by every layer.

Whatever depends on the step but not on the layer, such as a table of the chunks' own pages, is made when a backend is
bound. Nothing here waits for the device, and no shape depends on what is on it, so that binding and calling can be
captured in a CUDA graph. The numbers that the host must know are ``Chunks.longest`` and ``Chunks.cached``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.attention.prefill import paged_prefill_attention


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows of several sequences, sequence after sequence, behind what the cache holds of each."""

    block_tables: Tensor
    """int32 [slots, width]"""
    slots: Tensor
    """int32 [sequences]: whose table each has"""
    query_start: Tensor
    """int32 [sequences + 1]"""
    contexts: Tensor
    """int32 [sequences]: tokens of each sequence, these rows included"""
    longest: int
    """The most rows of one sequence, or a bound of it if ``cached`` is None."""
    slot_mapping: Tensor
    """int64 [rows or more]: address of each row in a cache seen as [blocks · block_tokens, …]"""
    cached: int | None = None
    """Tokens of all these sequences before the chunks. None: the host does not know, as under capture."""

    @property
    def lone(self) -> bool:
        """Whether this is one whole sequence: its keys and values are those of its own rows."""
        return self.cached == 0 and self.slots.numel() == 1


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all steps of a model have in common."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int


class AttendChunks(Protocol):
    """Attention of one step's chunks in one layer."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """``query``, ``out`` [rows, heads, head_dim]; ``keys``, ``values`` [blocks, block_tokens, kv_heads, head_dim].

        The pages hold the chunks' own keys and values, too. Rows behind ``query_start[-1]`` belong to no chunk: what
        ``out`` holds of them afterwards is undefined.
        """
        ...


class ChunkBackend(Protocol):
    """One way to compute it."""

    @property
    def name(self) -> str:
        """As a benchmark or a log calls it."""
        ...

    @property
    def lone_only(self) -> bool:
        """Whether it serves one whole sequence at a time only (:attr:`Chunks.lone`)."""
        ...

    @property
    def met_rows(self) -> tuple[int, ...]:
        """Rows of lone chunks that, one after another, make it compile or plan all that it may ever need."""
        ...

    def bind(self, chunks: Chunks) -> AttendChunks:
        """To one step."""
        ...


@dataclass(frozen=True, slots=True)
class PagedKernel:
    """Our own kernel, and its plain torch reference where there is no GPU."""

    name: str = "triton"
    lone_only: bool = False
    met_rows: tuple[int, ...] = (16, 64)

    def bind(self, chunks: Chunks) -> AttendChunks:
        """See :class:`ChunkBackend`."""

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
            paged_prefill_attention(
                query, keys, values, chunks.block_tables, chunks.slots, chunks.query_start, chunks.contexts,
                chunks.longest, scale, out=out,
            )  # fmt: skip

        return attend


class LoneAttention(Protocol):
    """Causal attention of one whole sequence that is not in pages."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """``query``, ``out`` [rows, heads, head_dim]; ``keys``, ``values`` [rows, kv_heads, head_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class LoneKernel:
    """A kernel without pages for a fresh prompt alone in its step: the prompt's keys and values are gathered first.

    Several prompts would have to stand one after another, and a kernel that loads tiles reads past the end of a
    sequence: zero times the not-a-number of the one behind it is not a number.
    """

    name: str
    attention: LoneAttention
    met_rows: tuple[int, ...]
    lone_only: bool = True

    def bind(self, chunks: Chunks) -> AttendChunks:
        """See :class:`ChunkBackend`. Raises ValueError if the chunks are more than one whole sequence."""
        if not chunks.lone:
            raise ValueError(f"{self.name} attends one whole sequence alone")
        rows = chunks.longest
        places = chunks.slot_mapping[:rows]

        def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
            key, value = (cache.flatten(0, 1).index_select(0, places) for cache in (keys, values))
            self.attention(query[:rows], key, value, scale, out[:rows])

        return attend
