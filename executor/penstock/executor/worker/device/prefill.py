"""Which kernel attends the chunks of a step: a table by shape, and what of it a machine has."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from penstock.executor.executor import ExecutorError
from penstock.executor.layers.attention import LayerCache
from penstock.kernels.attention.chunks import (
    AttendChunks,
    AttentionShape,
    ChunkBackend,
    Chunks,
    LoneKernel,
    PagedKernel,
)
from penstock.kernels.attention.flash import (
    LONE_ROWS,
    MOST_SEQUENCES,
    Flash4,
    FlashPages,
    FlashUnavailable,
    flash_library,
)
from penstock.kernels.dispatch import INTERPRETED

BACKENDS: Final = ("auto", "triton", "flash_attn")
"""What ``ModelSpec.attention_backend`` may be."""


class Kernel(enum.Enum):
    """One way to attend chunks."""

    TRITON = enum.auto()
    """Ours, over pages; in plain torch where there is no GPU."""
    FLASH = enum.auto()
    """flash-attn over pages."""
    FLASH_LONE = enum.auto()
    """flash-attn over the gathered keys and values of one fresh prompt."""


_UNLIMITED: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Rule:
    """Steps for which a kernel is chosen: all of it must be true, and the kernel must be one for such chunks."""

    kernel: Kernel
    rows: int = 0
    """At least so many rows of chunks, padding included."""
    most_rows: int = _UNLIMITED
    cached: int = 0
    """At least so many tokens before the chunks, of all sequences together; the host may not know: then none."""

    def holds(self, chunks: Chunks, rows: int) -> bool:
        """For ``rows`` rows of these chunks."""
        if not self.rows <= rows <= self.most_rows or (chunks.cached or 0) < self.cached:
            return False
        match self.kernel:
            case Kernel.TRITON:
                return True
            case Kernel.FLASH:
                return chunks.slots.numel() <= MOST_SEQUENCES
            case Kernel.FLASH_LONE:
                return chunks.lone and chunks.longest >= LONE_ROWS


# Microseconds of a layer on an H200 (bench/results/h200/prefill.jsonl), pages of 64 tokens: ours, flash-attn-4 over
# pages, the same without pages, cuDNN, which is therefore not among the kernels.
#                            32 query heads                16 query heads
#   1 × 128               7     9    11    14           7    10    10    14
#   1 × 512              15    14    16    21          12    13    15    20
#   1 × 1,024            39    27    27    42          24    20    22    28
#   1 × 2,048           115    75    75     —          67    39    41     —
#   1 × 4,096           373   245   227     —         217   126   123     —
#   1 × 8,192          1369   923   842     —         710   444   418     —
#   8 × 1,024           256   200     —     —         130   100     —     —
#   1 × 512 over 4,096   91    67     —     —          69    63     —     —
#   4 × 512 over 4,096  384   244     —     —         203   128     —     —
#   2,048 over 8,192    790   487     —     —         412   247     —     —
# A step of more than 512 rows is launched kernel by kernel as fast as the host can, and flash-attn-4 takes the host
# 67 µs a layer over pages and 115 without, ours 27: below 2,048 rows it would lose that way what it gains.
AUTO: Final = (
    Rule(Kernel.FLASH_LONE, rows=4096),
    Rule(Kernel.FLASH, rows=2048),
    Rule(Kernel.FLASH, rows=512, cached=2048),
    Rule(Kernel.TRITON),
)
"""The first that holds and that the machine has. flash-attn 2 has not been measured: it is asked for by name only."""
FLASH_ONLY: Final = (Rule(Kernel.FLASH_LONE, rows=4096), Rule(Kernel.FLASH), Rule(Kernel.TRITON))
"""Ours for what flash-attn does not take: more sequences than MOST_SEQUENCES."""
TRITON_ONLY: Final = (Rule(Kernel.TRITON),)


class Prefill:
    """The rules that count, and a backend for each."""

    def __init__(
        self,
        rules: Sequence[Rule] = TRITON_ONLY,
        others: Mapping[Kernel, ChunkBackend] | None = None,
        heads: int | None = None,
    ) -> None:
        """``others``: the backends beside our own; rules of kernels that are not among them are left out.

        ``heads``: query heads of the model; None will do if there are no others.
        """
        self._heads = heads
        backends: dict[Kernel, ChunkBackend] = {Kernel.TRITON: PagedKernel(), **(others or {})}
        self._rules = [(rule, backends[rule.kernel]) for rule in rules if rule.kernel in backends]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the backends, in the order in which they are asked."""
        return tuple(dict.fromkeys(backend.name for _, backend in self._rules))

    def backend(self, chunks: Chunks, rows: int) -> ChunkBackend:
        """The one for ``rows`` rows of these chunks, padding included."""
        return next(backend for rule, backend in self._rules if rule.holds(chunks, rows))

    def bind(self, chunks: Chunks, rows: int) -> AttendChunks:
        """The same, bound to a step. Nothing here waits for the device."""
        return self.backend(chunks, rows).bind(chunks)

    def meet(self, cache: LayerCache, tables: Tensor, nobody: int) -> None:
        """Launch all that any backend may need: nothing is to be compiled, imported or planned later.

        Our own kernel alone is met by the first steps. ``tables`` int32 [slots, width]; slot ``nobody`` has the scratch
        block throughout. Nothing is read but this block and the first place of the pool.
        """
        if self._heads is None:
            return
        block_tokens, _, head_dim = cache.keys.shape[1:]
        for backend in dict.fromkeys(backend for _, backend in self._rules):
            for wanted in backend.met_rows:
                rows = wanted if backend.lone_only else min(wanted, tables.shape[1] * block_tokens)
                query = cache.keys.new_zeros(rows, self._heads, head_dim)
                chunks = _lone_chunk(rows, tables, nobody)
                backend.bind(chunks)(query, cache.keys, cache.values, head_dim**-0.5, torch.empty_like(query))


def _lone_chunk(rows: int, tables: Tensor, nobody: int) -> Chunks:
    def column(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=tables.device)

    places = torch.zeros(rows, dtype=torch.int64, device=tables.device)
    return Chunks(tables, column(nobody), column(0, rows), column(rows), rows, places, cached=0)


def choose_prefill(wanted: str, shape: AttentionShape) -> Prefill:
    """What ``ModelSpec.attention_backend`` asks for, on this machine. Imports flash-attn if it may be used.

    Raises ExecutorError with one line if it is unknown, or impossible here.
    """
    check_backend(wanted, shape.device)
    if wanted == "triton" or (wanted == "auto" and shape.device.type != "cuda"):
        return Prefill()
    try:
        library = flash_library(shape)
    except FlashUnavailable as reason:
        if wanted == "flash_attn":
            raise ExecutorError(f"attention_backend 'flash_attn' is not possible: {reason}") from reason
        return Prefill()
    if wanted == "auto" and not isinstance(library, Flash4):
        return Prefill()
    flash: dict[Kernel, ChunkBackend] = {
        Kernel.FLASH: FlashPages(library),
        Kernel.FLASH_LONE: LoneKernel(f"{library.name}, no pages", library.alone, (LONE_ROWS,)),
    }
    if wanted == "flash_attn":
        return Prefill(FLASH_ONLY, flash, shape.heads)
    return Prefill(AUTO, flash, shape.heads)


def check_backend(wanted: str, device: torch.device) -> None:
    """Raises ExecutorError with one line for an ``attention_backend`` that ``device`` cannot have."""
    if wanted not in BACKENDS:
        raise ExecutorError(f"attention_backend {wanted!r} is not known, only {', '.join(map(repr, BACKENDS))}")
    if wanted != "auto" and device.type != "cuda" and not INTERPRETED:
        raise ExecutorError(f"attention_backend {wanted!r} is not possible: it needs a GPU, the device is {device}")
